"""Affine grids: errors of at most half a step, and scales that engines don't round again."""

from __future__ import annotations

import pytest
import torch

from quantkit.base.errors import InputError
from quantkit.methods import rtn
from quantkit.methods.grids import Grid, exact_scale, grouped, nearest_codes, search_range

GRIDS = [
    Grid(bits, group, symmetric)
    for bits in range(2, 9)
    for group in (32, -1)
    for symmetric in (True, False)
]


def weight(rows: int = 24, columns: int = 96) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.05


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rounding_is_within_half_a_step(grid: Grid) -> None:
    w = weight()
    tensor = rtn.quantize(w, grid)
    assert tensor.codes.max() <= grid.levels
    step = tensor.scales.repeat_interleave(grid.columns(96), 1)
    error = (tensor.dequantize() - w).abs()
    # Symmetric grids clip the extreme; rounding the scale and the zero point adds a little.
    slack = {True: 1.01, False: 0.5 * 1.02 + 0.5}[grid.symmetric]
    inside = (tensor.codes > 0) & (tensor.codes < grid.levels)
    assert (error[inside] <= 0.5001 * step[inside]).all()
    assert (error <= (slack + grid.levels * 2**-8) * step).all()


def test_scales_are_exact_in_fp16_and_bf16() -> None:
    scales = exact_scale((torch.rand(100_000) * 25 - 20).exp())
    assert torch.equal(scales, scales.half().float())
    assert torch.equal(scales, scales.bfloat16().float())
    assert (scales > 0).all()


def test_zero_is_exact() -> None:
    w = weight()
    w[:, :32] = 0
    w[3] = 0
    for grid in (Grid(4, 32, True), Grid(4, 32, False)):
        value = rtn.quantize(w, grid).dequantize()
        assert (value[w == 0] == 0).all()
        assert value.isfinite().all()


def test_zero_points_stay_above_zero_where_the_format_stores_one_less() -> None:
    positive = weight().abs() + 0.01
    tensor = rtn.quantize(positive, Grid(4, 32, False, first_zero=1))
    assert tensor.zeros.min() == 1
    step = tensor.scales.repeat_interleave(32, 1)
    assert ((tensor.dequantize() - positive).abs() <= 0.6 * step).all()


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match="group size 64 doesn't divide 96"):
        rtn.quantize(weight(), Grid(4, 64, True))


def test_a_searched_range_costs_less() -> None:
    w, grid = weight(), Grid(3, 32, False)
    w[:, 5] *= 20  # an outlier of no importance
    importance = torch.ones(96)
    importance[5] = 0.0
    weights = importance.view(3, 32)
    scale, zero = search_range(
        w, grid, lambda error: (error**2 * weights).sum(2), steps=20, smallest=0.6
    )
    codes = nearest_codes(grouped(w, grid), scale[..., None], zero[..., None], grid)
    searched = ((codes - zero[..., None]) * scale[..., None]).flatten(1)
    nearest = rtn.quantize(w, grid).dequantize()
    error = [((value - w).square() * importance).sum() for value in (searched, nearest)]
    assert error[0] < 0.7 * error[1]
