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
from quantkit.formats.bitsandbytes import BitsandbytesFormat
from quantkit.formats.format import Contents
from quantkit.formats.packed import open_artifact
from quantkit.methods.nf4 import Nf4Scheme
from quantkit.plan.linears import LinearPlan
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


@pytest.mark.parametrize(
    ("shape", "block", "runs"),
    [
        ((64, 128), 64, True),
        ((96, 256), 128, True),
        ((48, 128), 64, False),  # "N must be divisible by block_n"
        ((8, 64), 64, False),
        ((64, 96), 64, False),  # blocks that begin in one row and end in the next
        ((64, 192), 128, False),
    ],
)
def test_widths_that_the_kernel_for_cpus_refuses(
    shape: tuple[int, int], block: int, runs: bool
) -> None:
    """Oracle: bitsandbytes' own layer, as transformers makes and runs it."""
    import bitsandbytes
    from bitsandbytes.functional import has_avx512bf16

    contents = Contents([Nf4Scheme(block, False)], [shape])
    transformers, *_ = BitsandbytesFormat().loading(contents)
    assert (transformers.loads == "yes") == runs
    if not has_avx512bf16():
        pytest.skip("this CPU has no bfloat16, so that bitsandbytes doesn't use the kernel")
    layer = bitsandbytes.nn.Linear4bit(
        shape[1], shape[0], bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    weight = torch.ones(shape, dtype=torch.bfloat16)
    layer.weight = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", blocksize=block, compress_statistics=False
    )
    layer = layer.to("cpu").eval()
    inputs = torch.ones(1, shape[1], dtype=torch.bfloat16)
    with torch.inference_mode():
        if runs:
            layer(inputs)
            return
        with pytest.raises((AssertionError, RuntimeError)):
            layer(inputs)


def test_linears_that_no_engine_runs_stay_as_they_are(tiny: Tiny) -> None:
    source = tiny("llama", torch.bfloat16, hidden_size=128, intermediate_size=80)
    plan = prepare(load_recipe("nf4", ["quantize.unfit=keep"]), str(source)).plan
    assert isinstance(plan, LinearPlan)
    kept = {name.rpartition(".")[2] for name in plan.kept}
    # 80 rows aren't divisible by 32, nor 80 columns by the block of 64.
    assert kept == {"gate_proj", "up_proj", "down_proj"}
    assert "transformers won't run it on CPU" in " ".join(plan.notes)
    skipped = plan.quantization_config["llm_int8_skip_modules"]
    assert set(plan.kept) <= set(skipped)


def test_the_plan_names_linears_that_transformers_will_not_run(tiny: Tiny) -> None:
    # Most of the weights, so that they are quantized: on a GPU another kernel may run them.
    source = tiny("llama", torch.bfloat16, hidden_size=128, intermediate_size=208)
    [note] = prepare(load_recipe("nf4"), str(source)).plan.notes
    assert "transformers won't run the artifact on CPU" in note
    ignore = 'quantize.ignore to ["lm_head", "model.layers.*.mlp.gate_proj"'
    assert ignore in note and "down_proj" in note and "self_attn" not in note
    settings = note.partition("set quantize.ignore to ")[2].rstrip(".")
    job = prepare(load_recipe("nf4", [f"quantize.ignore={settings}"]), str(source))
    assert not job.plan.notes and job.plan.quantized_bits_per_weight
