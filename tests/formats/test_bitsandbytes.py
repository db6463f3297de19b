"""Every tensor of an NF4 artifact is what transformers' own save_pretrained writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from quantkit.base.progress import Silent
from quantkit.commands.quantize import prepare, quantize
from quantkit.formats.packed import open_artifact
from quantkit.recipes.recipe import load_recipe
from tests.helpers.tiny import Tiny


@pytest.mark.parametrize("double", [True, False])
def test_equal_to_save_pretrained(tiny: Tiny, tmp_path: Path, double: bool) -> None:
    source = tiny("llama", torch.bfloat16, hidden_size=128, intermediate_size=192)
    job = prepare(load_recipe("nf4", [f"quantize.double_quant={str(double).lower()}"]), str(source))
    quantize(job, tmp_path / "ours", device="cpu", force=False, progress=Silent())

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head"],
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "theirs")

    ours_tensors = load_file(tmp_path / "ours" / "model.safetensors")
    their_tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    assert ours_tensors.keys() == their_tensors.keys()
    for name, tensor in their_tensors.items():
        assert ours_tensors[name].dtype == tensor.dtype, name
        assert torch.equal(ours_tensors[name], tensor), name

    def settings(folder: str) -> dict[str, Any]:
        return json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"]

    assert settings("ours") == settings("theirs")

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, theirs.eval()(ids).logits)
    weights = open_artifact(tmp_path / "ours")
    key = "model.layers.0.mlp.down_proj.weight"
    assert weights.shape(key) == tuple(weights.read(key).shape) == (128, 192)
