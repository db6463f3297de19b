"""The corrected pass: what the unquantized and the quantized model read, side by side."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from quantkit.calibration import passing
from quantkit.calibration.corrected import CorrectedPass
from quantkit.calibration.needs import Needs
from quantkit.calibration.replay import Replay
from tests.helpers.measured_block import random_rows, stream_of
from tests.helpers.present import present
from tests.helpers.tiny import ARCHITECTURES, Tiny

NEEDS = Needs("gram", propagate="corrected")


def input_of(model: nn.Module, name: str, ids: torch.Tensor) -> torch.Tensor:
    """What the linear ``name`` of a whole model reads, (tokens, width)."""
    seen = []
    linear = model.get_submodule(name)
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    return seen[0].flatten(0, -2).float()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_inputs_are_those_of_the_two_whole_models(tiny: Tiny, model_type: str) -> None:
    """Every linear is quantized, here to multiples of 1/64, as soon as its input is measured."""
    directory = tiny(model_type)
    rows = random_rows(4, 16)
    stream = stream_of(directory)
    skeleton = stream.skeleton
    calibration = CorrectedPass(stream, rows, NEEDS)
    original = AutoModelForCausalLM.from_pretrained(directory, dtype=skeleton.model.dtype).eval()
    quantized = copy.deepcopy(original)
    count = 0
    for index in range(len(skeleton.layers)):
        with stream.block(index) as block:
            for group in calibration.measure_in_turn(index, block, lambda: None):
                names = [f"{skeleton.layer_name(index)}.{name}" for name in group.consumers]
                x, y = (input_of(model, names[0], rows.ids) for model in (original, quantized))
                atol = 1e-3 * float(y.square().sum())
                torch.testing.assert_close(group.moment.matrix(), y.t() @ y, rtol=1e-3, atol=atol)
                # The drift may be in bfloat16.
                drift = present(group.drift).float()
                torch.testing.assert_close(drift, (x - y).t() @ y, rtol=5e-3, atol=atol)
                if index:
                    assert (x - y).norm() > 1e-3 * y.norm()
                for name, consumer in zip(names, group.consumers, strict=True):
                    value = (quantized.get_submodule(name).weight.data * 64).round() / 64
                    quantized.get_submodule(name).weight.data = value
                    block.get_submodule(consumer).weight.data = value.clone()
                    count += 1
    assert count == sum(len(skeleton.linears(index)) for index in range(len(skeleton.layers)))


def measured(directory: Path) -> list[torch.Tensor]:
    """All moments and drifts of a model whose weights are rounded to multiples of 1/64."""
    stream = stream_of(directory)
    calibration = CorrectedPass(stream, random_rows(3, 16), NEEDS)
    result: list[torch.Tensor] = []
    for index in range(len(stream.skeleton.layers)):
        with stream.block(index) as block:
            for group in calibration.measure_in_turn(index, block, lambda: None):
                result += [group.moment.matrix(), present(group.drift)]
                for consumer in group.consumers:
                    weight = block.get_parameter(f"{consumer}.weight")
                    weight.data = (weight.data * 64).round() / 64
    return result


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_replayed_parts_change_nothing(
    tiny: Tiny, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passing, "tokens_per_batch", lambda device: 16)  # several batches
    replayed = measured(tiny(model_type))
    monkeypatch.setattr(Replay, "use_inputs", lambda self, linears, inputs: False)
    whole = measured(tiny(model_type))
    assert len(replayed) == len(whole) >= 12
    assert all(map(torch.equal, replayed, whole))
