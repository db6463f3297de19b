"""AWQ: scales lower the loss and keep the function, clipping lowers every row's loss."""

from __future__ import annotations

import copy

import pytest
import torch

from quantkit.methods.awq import search as awq
from quantkit.methods.awq.method import Awq
from quantkit.methods.grids import Grid, gram_loss
from quantkit.methods.linears import BlockResult, Linears, Scheme
from quantkit.methods.rescaling import Target
from quantkit.model.stream import Batch
from tests.helpers.blocks import first_block
from tests.helpers.tiny import Tiny

METHOD = Awq(method="awq", bits=4, group_size=32, symmetric=False, format="awq")


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
