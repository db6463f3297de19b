"""Round to nearest: the plain method that every other one has to beat."""

from __future__ import annotations

from torch import Tensor

from quantkit.methods.grids import Grid, QuantizedTensor, assemble, encode, fit, grouped


def quantize(weight: Tensor, grid: Grid) -> QuantizedTensor:
    """Quantize ``weight`` (out_features, in_features; any float dtype) to the nearest codes."""
    groups = grouped(weight.float(), grid)
    scale, zero = fit(groups.amin(2), groups.amax(2), grid)
    codes = encode(groups, scale[..., None], zero[..., None], grid)
    return assemble(codes.flatten(1), scale, zero, grid)
