"""Folds are found for each architecture, and applying them leaves the output of a block alone."""

from __future__ import annotations

import pytest
import torch

from quantkit.calibration.folds import find_folds
from tests.helpers.blocks import first_block
from tests.helpers.tiny import Tiny

FOLDED = {
    # model type → linears of a block whose input can be rescaled, and the kinds of the folds
    "llama": (7, {"norm", "linear"}),
    "qwen3": (7, {"norm", "linear"}),
    "gemma2": (7, {"norm_plus_one", "linear"}),
    "gpt_neox": (2, {"norm"}),
    "opt": (6, {"norm", "linear"}),
    "olmo2": (2, {"linear"}),
}


@pytest.mark.parametrize("model_type", FOLDED)
def test_folds_are_found(tiny: Tiny, model_type: str) -> None:
    _, inputs, folds, _ = first_block(tiny(model_type))
    count, kinds = FOLDED[model_type]
    assert sum(len(fold.consumers) for fold in folds) == count
    assert {fold.kind for fold in folds} == kinds
    assert {fold.consumers for fold in folds} <= {tuple(group.consumers) for group in inputs}


@pytest.mark.parametrize("model_type", FOLDED)
def test_applying_folds_leaves_the_output(tiny: Tiny, model_type: str) -> None:
    """With arbitrary scales, up to rounding in float32."""
    block, _, folds, batch = first_block(tiny(model_type))
    run = lambda: block(batch.hidden, *batch.calls[0].args, **batch.calls[0].kwargs)  # noqa: E731
    with torch.inference_mode():
        before = run()
        for fold in folds:
            producer = block.get_submodule(fold.producer)
            scale = torch.rand(producer.weight.shape[0]) * 3 + 0.3
            producer.weight.data = fold.divide(producer.weight.data, scale)
            if getattr(producer, "bias", None) is not None:
                producer.bias.data = producer.bias.data / scale
            for name in fold.consumers:
                block.get_submodule(name).weight.data *= fold.expand(scale)
        torch.testing.assert_close(run(), before, rtol=1e-4, atol=1e-4)


def test_a_sister_block_is_proven_not_searched(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    block, inputs, folds, batch = first_block(tiny("llama"))
    monkeypatch.setattr(
        "quantkit.calibration.folds._candidates", lambda *_: pytest.fail("searched")
    )
    groups = [group.consumers for group in inputs]
    assert find_folds(block, groups, batch.calls[0], batch.hidden, 2, folds) == folds


def test_narrow_inverts_expand(tiny: Tiny) -> None:
    (fold,) = [f for f in first_block(tiny("llama"))[2] if f.repeat > 1]
    scale = torch.rand(32) + 0.5
    assert torch.equal(fold.narrow(fold.expand(scale)), scale)
    assert torch.allclose(fold.reduce(fold.expand(scale)), scale)
