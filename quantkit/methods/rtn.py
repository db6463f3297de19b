"""Round to nearest (RTN): the baseline that every other method has to beat."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from quantkit.methods.grids import (
    Grid,
    QuantizedTensor,
    as_grid,
    fit_range,
    grouped,
    nearest_codes,
)
from quantkit.methods.linears import BlockResult, Linears
from quantkit.methods.method import AffineMethod


class Rtn(AffineMethod):
    """Round to nearest: no calibration, no settings of its own."""

    tag = "rtn"
    calibration = "unused"

    method: Literal["rtn"]

    def needs(self) -> None:
        return None

    def quantize(self, linears: Linears) -> BlockResult:
        return linears.each(lambda weight, scheme: quantize(weight, as_grid(scheme)))


def quantize(weight: Tensor, grid: Grid) -> QuantizedTensor:
    """``weight`` (out, in), of any float dtype, as the nearest codes of the full ranges."""
    groups = grouped(weight.float(), grid)
    scale, zero = fit_range(groups.amin(2), groups.amax(2), grid)
    codes = nearest_codes(groups, scale[..., None], zero[..., None], grid)
    return QuantizedTensor.of_floats(grid, codes.flatten(1), scale, zero)
