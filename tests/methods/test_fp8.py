"""FP8: the nearest codes, and artifacts whose linears round their inputs."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from quantkit.base.progress import Silent
from quantkit.base.resources import demo_model
from quantkit.checkpoint.reader import Checkpoint
from quantkit.commands.quantize import prepare, quantize
from quantkit.engines.choose import engine_for
from quantkit.formats.packed import PackedCheckpoint, open_artifact
from quantkit.methods import fp8
from quantkit.methods.inputs import round_fp8
from quantkit.recipes.recipe import load_recipe


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_fp8_codes_are_the_nearest_and_never_infinite() -> None:
    weight = random(16, 128)
    weight[3, 5] = 40.0
    tensor = fp8.quantize(weight)
    assert torch.equal(tensor.scales, tensor.scales.half().float())
    assert torch.equal(tensor.scales, tensor.scales.bfloat16().float())
    assert tensor.codes.float().isfinite().all()
    step = (weight.abs() / 16).clamp(min=tensor.scales / 1024) * 1.01
    assert ((tensor.dequantize() - weight).abs() <= step).all()
    assert fp8.quantize(torch.zeros(2, 8)).dequantize().abs().max() == 0


def test_an_artifact_states_that_inputs_are_rounded(tmp_path: Path) -> None:
    job = prepare(load_recipe("fp8"), "demo")
    quantize(job, tmp_path / "fp8", device="cpu", force=False, progress=Silent())
    artifact = open_artifact(tmp_path / "fp8")
    assert isinstance(artifact, PackedCheckpoint)
    key = "model.layers.0.self_attn.q_proj.weight"
    assert artifact.input_rounding(key) is round_fp8
    assert artifact.input_rounding("model.norm.weight") is None
    assert artifact.shape(key) == Checkpoint(demo_model()).shape(key)
    assert artifact.parameters() == Checkpoint(demo_model()).parameters()
    assert engine_for(tmp_path / "fp8")[0] == "transformers"
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "float-quantized" and config["ignore"] == ["lm_head"]
