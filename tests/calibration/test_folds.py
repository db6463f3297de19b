"""Folds: found in every kind of block, and applying them leaves the block's output the same."""

from __future__ import annotations

import pytest
import torch

from quantkit.calibration import folds as folds_module
from quantkit.calibration.folds import find_folds
from tests.helpers.measured_block import measured_block
from tests.helpers.tiny import Tiny

FOLDED = {
    # model type → number of a block's linears whose input can be rescaled, kinds of the folds
    "llama": (7, {"norm", "linear"}),
    "qwen3": (7, {"norm", "linear"}),
    "gemma2": (7, {"norm_plus_one", "linear"}),
    "gpt_neox": (2, {"norm"}),
    "opt": (6, {"norm", "linear"}),
    "olmo2": (2, {"linear"}),
}


@pytest.mark.parametrize("model_type", FOLDED)
def test_folds_of_every_kind_of_block_are_found(tiny: Tiny, model_type: str) -> None:
    measured = measured_block(tiny(model_type))
    count, kinds = FOLDED[model_type]
    assert sum(len(fold.consumers) for fold in measured.folds) == count
    assert {fold.kind for fold in measured.folds} == kinds
    read_together = {tuple(group.consumers) for group in measured.inputs}
    assert {fold.consumers for fold in measured.folds} <= read_together


@pytest.mark.parametrize("model_type", FOLDED)
def test_any_scale_leaves_the_output_the_same(tiny: Tiny, model_type: str) -> None:
    """Up to rounding in float32, since the scales aren't powers of two."""
    measured = measured_block(tiny(model_type))
    before = measured.output()
    for fold in measured.folds:
        weight = measured.block.get_parameter(f"{fold.producer}.weight")
        scale = torch.rand(weight.shape[0]) * 3 + 0.3
        weight.data = fold.divide(weight.data, scale)
        bias = dict(measured.block.named_parameters()).get(f"{fold.producer}.bias")
        if bias is not None:
            bias.data = bias.data / scale
        for name in fold.consumers:
            measured.block.get_parameter(f"{name}.weight").data *= fold.expand(scale)
    torch.testing.assert_close(measured.output(), before, rtol=1e-4, atol=1e-4)


def test_known_folds_are_proven_without_a_search(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = measured_block(tiny("llama"))
    monkeypatch.setattr(folds_module, "_candidates", lambda *_: pytest.fail("searched"))
    groups = [group.consumers for group in measured.inputs]
    call, hidden = measured.batch.calls[0], measured.batch.hidden
    assert find_folds(measured.block, groups, call, hidden, 2, measured.folds) == measured.folds


def test_narrow_inverts_expand(tiny: Tiny) -> None:
    (fold,) = [fold for fold in measured_block(tiny("llama")).folds if fold.repeat > 1]
    scale = torch.rand(32) + 0.5
    assert torch.equal(fold.narrow(fold.expand(scale)), scale)
    assert torch.allclose(fold.reduce(fold.expand(scale)), scale)
