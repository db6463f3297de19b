"""Matrices whose columns a GGUF file has in another order than the checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantkit.base.errors import InputError
from quantkit.base.progress import Silent
from quantkit.commands.quantize import prepare, quantize
from quantkit.formats.packed import open_artifact
from quantkit.recipes.recipe import load_recipe
from tests.helpers.gguf_tiny import MODELS, TEXT, checkpoint

pytest.importorskip("gguf")
KEY = "model.layers.0.linear_attn.out_proj.weight"


def test_error_feedback_follows_the_order_of_the_columns(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = checkpoint(
        tmp_path / "model", model_type="qwen3_5_text", dtype=torch.float32, **MODELS["qwen3_5_text"]
    )
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXT * 30), encoding="utf-8")
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    # Features of very different size, as trained models have them: a wrong order would show.
    scale = torch.logspace(-1, 1, 256)[
        torch.randperm(256, generator=torch.Generator().manual_seed(0))
    ]
    with torch.no_grad():
        whole.model.layers[0].linear_attn.in_proj_z.weight *= scale[:, None]
    whole.save_pretrained(model)
    read: list[torch.Tensor] = []
    output = whole.model.layers[0].linear_attn.out_proj
    output.register_forward_pre_hook(lambda module, args: read.append(args[0][0]))
    ids = AutoTokenizer.from_pretrained(model)(text.read_text())["input_ids"][:128]
    whole(torch.tensor([ids]))
    inputs, weight = read[0].detach(), output.weight.detach()
    losses = {}
    for recipe in ("gguf-q2-k-gptq", "gguf-q4-k-m"):
        settings = [
            "quantize.mix=q2_k",
            f"calibration={{dataset: {text}, samples: 4, sequence_length: 128}}",
        ]
        job = prepare(load_recipe(recipe, settings), str(model))
        out = tmp_path / recipe
        quantize(job, out, device="cpu", force=False, progress=Silent(), cache=False)
        change = open_artifact(out).read(KEY) - weight
        losses[recipe] = float((inputs @ change.T).square().sum())
    assert losses["gguf-q2-k-gptq"] < 0.6 * losses["gguf-q4-k-m"]


def test_grids_of_such_a_matrix_are_refused(tmp_path: Path) -> None:
    model = checkpoint(tmp_path, model_type="qwen3_5_text", **MODELS["qwen3_5_text"])
    settings = ["quantize.format=gguf", "quantize.group_size=32"]
    with pytest.raises(InputError, match=r"linear_attn\.out_proj\.weight"):
        prepare(load_recipe("rtn-w4-g128", settings), str(model))
