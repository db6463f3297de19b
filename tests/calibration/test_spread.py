"""Rows spread over several devices: here each of them is the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantkit.base.errors import InputError
from quantkit.base.progress import Silent
from quantkit.calibration import passing
from quantkit.calibration.needs import Needs
from quantkit.calibration.passing import CalibrationPass
from quantkit.calibration.statistics import InputStatistics
from quantkit.commands import quantize as command
from quantkit.commands.quantize import prepare, quantize
from quantkit.recipes.recipe import load_recipe
from tests.helpers.measured_block import random_rows, stream_of
from tests.helpers.tiny import Tiny

CPU = torch.device("cpu")


def measured(directory: Path, needs: Needs, count: int) -> list[list[InputStatistics]]:
    """The statistics of each layer, and of what the output embedding reads, on ``count`` devices.

    Weights are rounded between layers, so that ``carry`` has something to pass on.
    """
    stream = stream_of(directory)
    calibration = CalibrationPass(stream, random_rows(5, 16), needs, devices=[CPU] * count)
    result = []
    for index in range(len(stream.skeleton.layers)):
        with stream.block(index) as block:
            inputs, folds = calibration.measure(index, block)
            assert bool(folds) == needs.folds
            if not needs.independent:
                for parameter in block.parameters():
                    parameter.data = (parameter.data * 64).round() / 64
                calibration.carry(index, block, lambda: None)
        result.append(inputs)
    return [*result, [calibration.output()]]


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "gemma3_text"])
@pytest.mark.parametrize(
    "needs",
    [Needs("gram", folds=True), Needs("diagonal"), Needs("gram", propagate="quantized")],
    ids=["folds", "diagonal", "carried"],
)
def test_sums_are_those_of_one_device(
    tiny: Tiny, model_type: str, needs: Needs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passing, "tokens_per_batch", lambda device: 16)  # a row is a batch
    directory = tiny(model_type)
    one = measured(directory, needs, 1)
    for count in (2, 3):
        for layer, same in zip(one, measured(directory, needs, count), strict=True):
            by_name = {tuple(group.consumers): group for group in same}
            assert len(by_name) == len(layer)
            for group in layer:
                other = by_name[tuple(group.consumers)]
                assert (other.tokens, other.routed) == (group.tokens, group.routed)
                for part, sums in zip(group.moment.parts(), other.moment.parts(), strict=True):
                    torch.testing.assert_close(sums, part, rtol=1e-4, atol=1e-5)
                for name, energy in group.energy.items():
                    torch.testing.assert_close(other.energy[name], energy, rtol=1e-5, atol=1e-9)


def test_layers_that_hand_on_more_are_refused(tiny: Tiny) -> None:
    stream = stream_of(tiny("gemma4_text"))
    with pytest.raises(InputError, match="can't be spread over several devices"):
        CalibrationPass(stream, random_rows(2, 16), Needs("gram"), devices=[CPU, CPU])


@pytest.mark.parametrize("recipe", ["gptq-w4-g128", "awq-w4-g128", "gguf-q4-k-m-gptq"])
def test_an_artifact_made_on_several_devices(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nearly all bytes are those that one device makes: sums differ in their last bits."""
    weights = []
    for devices in ((CPU,), (CPU, CPU)):
        monkeypatch.setattr(command, "resolve_devices", lambda name, chosen=devices: chosen)
        out = tmp_path / str(len(devices))
        small = ["calibration.samples=6", "calibration.sequence_length=256"]
        job = prepare(load_recipe(recipe, small), "demo")
        quantize(job, out, device="auto", force=False, progress=Silent(), cache=False)
        [file] = [*out.glob("*.safetensors"), *out.glob("*.gguf")]
        weights.append(torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8))
    one, two = weights
    assert one.shape == two.shape
    assert (one == two).float().mean() > 0.99
