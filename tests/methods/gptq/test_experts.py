"""Experts of a mixture, each with the Hessian of the tokens that are sent to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.calibration.needs import Needs
from quantkit.methods.gptq.method import Gptq
from quantkit.methods.grids import Grid
from quantkit.methods.linears import Linears
from quantkit.methods.rtn import Rtn
from tests.helpers.measured_block import measured_block
from tests.helpers.tiny import Tiny

TOKENS, ACTIVE = 8 * 32, 2


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (3, False)])
def test_no_expert_loses_more_than_by_rounding_to_nearest(
    model_type: str, bits: int, symmetric: bool, tiny: Tiny
) -> None:
    measured = measured_block(tiny(model_type), Needs("gram"))
    names = {n for group in measured.inputs for n in group.consumers if ".experts." in n}
    grams = {
        name: group.moment.matrix().double()
        for group in measured.inputs
        for name in group.consumers
        if name in names
    }
    routed = {
        name.rpartition(".")[0]: count
        for group in measured.inputs
        for name, count in group.routed.items()
        if name in names
    }
    assert len(routed) == 4 and sum(routed.values()) == TOKENS * ACTIVE
    grid = Grid(bits, 32, symmetric)
    linears = Linears.of(measured.block, dict.fromkeys(sorted(names), grid), measured.inputs)
    options: dict[str, Any] = {
        "bits": bits,
        "group_size": 32,
        "symmetric": symmetric,
        "format": "gptq",
    }
    losses: list[dict[str, float]] = []
    for method in (Gptq(method="gptq", **options), Rtn(method="rtn", **options)):
        made = method.quantize(linears).linears
        assert made.keys() == names
        losses.append(
            {
                name: loss(linears.weights[name], linear.tensor.dequantize(), grams[name])
                for name, linear in made.items()
            }
        )
    gptq, rtn = losses
    assert all(0 < gptq[name] <= rtn[name] for name in names)
    assert sum(gptq.values()) < 0.8 * sum(rtn.values())


def loss(weight: Tensor, rounded: Tensor, gram: Tensor) -> float:
    """The squared error of the outputs over the tokens of the expert."""
    error = (weight - rounded).double()
    return float(torch.einsum("oi,ij,oj->", error, gram, error))
