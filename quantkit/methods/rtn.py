"""Round to nearest: the plain method that every other one has to beat."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from quantkit.methods.grids import Grid, QuantizedTensor, as_grid, assemble, encode, fit, grouped
from quantkit.methods.linears import BlockResult, Linears
from quantkit.methods.method import AffineMethod


class Rtn(AffineMethod):
    """Round to nearest."""

    tag = "rtn"
    calibration = "unused"

    method: Literal["rtn"]

    def needs(self) -> None:
        return None

    def quantize(self, linears: Linears) -> BlockResult:
        return linears.each(lambda weight, scheme: quantize(weight, as_grid(scheme)))


def quantize(weight: Tensor, grid: Grid) -> QuantizedTensor:
    """Quantize ``weight`` (out_features, in_features; any float dtype) to the nearest codes."""
    groups = grouped(weight.float(), grid)
    scale, zero = fit(groups.amin(2), groups.amax(2), grid)
    codes = encode(groups, scale[..., None], zero[..., None], grid)
    return assemble(codes.flatten(1), scale, zero, grid)
