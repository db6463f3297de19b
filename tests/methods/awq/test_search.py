"""AWQ: scales and clipping lower the loss, and rescaling leaves the block's function alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quantkit.methods.awq import search as awq
from quantkit.methods.awq.method import Awq
from quantkit.methods.grids import Grid, gram_loss
from quantkit.methods.linears import Linears, Scheme
from quantkit.methods.rescaling import Target
from tests.helpers.measured_block import measured_block
from tests.helpers.tiny import Tiny

METHOD = Awq(method="awq", bits=4, group_size=32, symmetric=False, format="awq")


def schemes(block: nn.Module, skip: tuple[str, ...] = ()) -> dict[str, Scheme]:
    return {
        name: Grid(4, 32, False)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and name not in skip
    }


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "opt"])
@pytest.mark.parametrize("skip", [(), ("self_attn.q_proj",)])
def test_scaling_lowers_the_loss_and_keeps_the_function(
    tiny: Tiny, model_type: str, skip: tuple[str, ...]
) -> None:
    measured = measured_block(tiny(model_type))
    block, inputs, folds = measured.block, measured.inputs, measured.folds
    chosen = schemes(block, skip)
    plain = METHOD.quantize(Linears.of(block, chosen, inputs))
    scaled = METHOD.quantize(Linears.of(block, chosen, inputs, folds))
    assert not any(linear.report.scaled for linear in plain.linears.values())
    assert not plain.changed
    errors = [
        {name: linear.report.error for name, linear in result.linears.items()}
        for result in (plain, scaled)
    ]
    for fold in folds:
        names = [name for name in fold.consumers if name in chosen]
        energy = {n: float(g.energy[n]) for g in inputs for n in g.consumers if n in names}
        before, after = (sum(error[name] * energy[name] for name in names) for error in errors)
        # Rows that were divided have their scales rounded otherwise, no more.
        assert after <= before * 1.02
    # The norms of opt have biases, so that its scales are powers of two.
    if model_type != "opt" and not skip:
        assert sum(bool(linear.report.scaled) for linear in scaled.linears.values()) >= 2
    exact = measured.output()
    distances = [
        (measured.output(measured.replaced(result)) - exact).norm() for result in (plain, scaled)
    ]
    # A scale that isn't undone, or in the wrong place, would be off by orders of magnitude.
    assert distances[1] < 1.3 * distances[0]


def test_a_linear_without_a_fold_is_quantized_unscaled(tiny: Tiny) -> None:
    measured = measured_block(tiny("gpt_neox"))
    block = measured.block
    result = METHOD.quantize(Linears.of(block, schemes(block), measured.inputs, measured.folds))
    scaled = {name: linear.report.scaled for name, linear in result.linears.items()}
    assert scaled["attention.dense"] is False and scaled["mlp.dense_4h_to_h"] is False


def test_clipping_lowers_every_rows_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(32, 64, generator=generator) ** 3
    x = torch.randn(256, 64, generator=generator)
    gram, target = x.t() @ x, Target(w, Grid(3, 32, False), torch.ones(32))
    losses = []
    for clip in (False, True):
        rounded = awq.quantize_target(target, awq.InputGram(gram), clip=clip)
        losses.append(gram_loss(rounded.tensor.dequantize() - w, gram))
    assert (losses[1] <= losses[0] * 1.01).all() and losses[1].sum() < 0.95 * losses[0].sum()
