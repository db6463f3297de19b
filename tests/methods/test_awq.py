"""AWQ: folds leave the block alone, scales lower the loss, and what can't be folded is said."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.calibration.folds import Fold, find_folds
from quantkit.calibration.needs import Needs
from quantkit.calibration.passing import CalibrationPass
from quantkit.calibration.statistics import InputStatistics
from quantkit.calibration.text import Rows
from quantkit.checkpoint.reader import Checkpoint
from quantkit.methods.awq import search as awq
from quantkit.methods.awq.method import Awq
from quantkit.methods.grids import Grid, gram_loss
from quantkit.methods.linears import BlockResult, Linears, Scheme
from quantkit.methods.rescaling import Target
from quantkit.model.skeleton import Skeleton
from quantkit.model.stream import Batch, Stream
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
METHOD = Awq(method="awq", bits=4, group_size=32, symmetric=False, format="awq")


def rows(count: int = 8, length: int = 32) -> Rows:
    ids = torch.randint(0, 96, (count, length), generator=torch.Generator().manual_seed(5))
    return Rows(ids, "", count)


def first_block(
    directory: Path, *, folds: bool = True
) -> tuple[Any, list[InputStatistics], list[Fold], Batch]:
    """(block in float32, its measured inputs, folds, a batch and its call) of layer 0."""
    checkpoint = Checkpoint(directory)
    stream = Stream(Skeleton(checkpoint), checkpoint, torch.device("cpu"))
    calibration = CalibrationPass(stream, rows(), Needs("gram", folds=folds))
    before = stream.begin(rows(2).ids, 2)[0]
    with stream.block(0) as block:
        inputs, found = calibration.through(0, block)
        block = copy.deepcopy(block)
    return block, inputs, found, before


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


def schemes(block: torch.nn.Module, skip: tuple[str, ...] = ()) -> dict[str, Scheme]:
    return {
        name: Grid(4, 32, False)
        for name, module in block.named_modules()
        if isinstance(module, torch.nn.Linear) and name not in skip
    }


def rebuilt_output(block: torch.nn.Module, result: BlockResult, batch: Batch) -> torch.Tensor:
    """The block's output with every tensor replaced by what was quantized and rescaled."""
    block = copy.deepcopy(block)
    for name, linear in result.linears.items():
        block.get_submodule(name).weight.data = linear.tensor.dequantize()
    for name, value in result.changed.items():
        block.get_parameter(name).data = value
    with torch.inference_mode():
        return block(batch.hidden, *batch.calls[0].args, **batch.calls[0].kwargs)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "opt"])
@pytest.mark.parametrize("skip", [(), ("self_attn.q_proj",)])
def test_scaling_only_lowers_the_loss_and_keeps_the_function(
    tiny: Tiny, model_type: str, skip: tuple[str, ...]
) -> None:
    block, inputs, folds, batch = first_block(tiny(model_type))
    chosen = schemes(block, skip)
    plain = METHOD.quantize(Linears.of(block, chosen, inputs))
    scaled = METHOD.quantize(Linears.of(block, chosen, inputs, folds))
    assert not any(linear.report.scaled for linear in plain.linears.values())
    assert not plain.changed
    error = [
        {name: linear.report.error for name, linear in r.linears.items()} for r in (plain, scaled)
    ]
    for fold in folds:
        names = [name for name in fold.consumers if name in chosen]
        energy = {n: float(g.energy[n]) for g in inputs for n in g.consumers if n in names}
        mine, unscaled = (sum(e[name] * energy[name] for name in names) for e in reversed(error))
        # Rescaled rows change the rounding of scales, no more; an unscaled input is equal.
        assert mine <= unscaled * 1.02
    if model_type != "opt" and not skip:  # whose norms have biases: powers of two only
        assert sum(bool(linear.report.scaled) for linear in scaled.linears.values()) >= 2
    with torch.inference_mode():
        exact = block(batch.hidden, *batch.calls[0].args, **batch.calls[0].kwargs)
    distance = [(rebuilt_output(block, r, batch) - exact).norm() for r in (plain, scaled)]
    assert distance[1] < 1.3 * distance[0]  # a fold undone wrongly would be off by orders


def test_a_linear_without_a_fold_is_quantized_unscaled(tiny: Tiny) -> None:
    block, inputs, folds, _ = first_block(tiny("gpt_neox"))
    result = METHOD.quantize(Linears.of(block, schemes(block), inputs, folds))
    scaled = {name: linear.report.scaled for name, linear in result.linears.items()}
    assert scaled["attention.dense"] is False and scaled["mlp.dense_4h_to_h"] is False


def test_clipping_lowers_every_rows_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(32, 64, generator=generator) ** 3
    x = torch.randn(256, 64, generator=generator)
    gram, target = x.t() @ x, Target(w, Grid(3, 32, False), torch.ones(32))
    loss = [
        gram_loss(awq.quantize(target, awq.Inputs(gram), clip=clip).tensor.dequantize() - w, gram)
        for clip in (False, True)
    ]
    assert (loss[1] <= loss[0] * 1.01).all() and loss[1].sum() < 0.95 * loss[0].sum()


def test_linears_that_read_one_tensor_share_one_gram_matrix(tiny: Tiny) -> None:
    _, inputs, _, _ = first_block(tiny("llama"))
    assert [group.consumers for group in inputs] == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]
    assert all(group.tokens == 8 * 32 for group in inputs)
    for group in inputs:
        gram = group.moment.matrix()
        assert torch.allclose(gram, gram.t(), rtol=1e-4, atol=1e-3)
        assert torch.allclose(gram.diagonal(), group.moment.diagonal(), rtol=1e-4)
