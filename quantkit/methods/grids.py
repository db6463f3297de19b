"""Affine integer grids: what a weight is rounded to, apart from how its code is chosen.

A weight matrix W (out_features, in_features) is cut along in_features into groups of
``group_size`` columns. Each (row, group) has a scale s and a zero point z, and its codes q
are integers from 0 to 2^bits - 1:

    w = (q - z) * s

Symmetric grids have z = 2^(bits-1) everywhere and s = 2 * absmax / (2^bits - 1); asymmetric
ones have s = (max - min) / (2^bits - 1) and z = round(-min / s), with min <= 0 <= max.
Both conventions are those of the AWQ and GPTQ formats.

Scales are rounded *before* codes are chosen, to values that fp16 and bf16 both hold exactly:
engines re-round scales to the dtype they run in, and then still compute what was judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from quantkit.base.errors import InputError
from quantkit.base.parallel import parallel_map

AT_ONCE = 1 << 18  # weights whose ranges are searched together
_STRIDE = 4  # steps of a range that are skipped at first; a power of two


class Quantized(Protocol):
    """What every method returns: something that knows its shape and its value."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def dequantize(self) -> Tensor:
        """The value in float32, shape (out_features, in_features)."""
        ...


@dataclass(frozen=True)
class Grid:
    """Bits, columns per group (-1: the whole row) and symmetry of one tensor.

    first_zero: the lowest zero point of an asymmetric grid; 1 where a format stores z - 1;
    exact_minimum: fp16 must hold -z·s, so that scales have fewer bits; where a format stores that;
    rounds_inputs: engines round the linear's inputs too, to int8, a token at a time.
    """

    bits: int
    group_size: int
    symmetric: bool
    first_zero: int = 0
    exact_minimum: bool = False
    rounds_inputs: bool = False

    @property
    def levels(self) -> int:
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        return 1 << (self.bits - 1)

    def columns(self, in_features: int) -> int:
        """Columns per group for rows of ``in_features``. Raises InputError if they don't divide."""
        columns = in_features if self.group_size == -1 else self.group_size
        if in_features % columns:
            raise InputError(
                f"group size {columns} doesn't divide {in_features} input features",
                fix="Choose a group size that divides every quantized layer's input, "
                "or -1 for one group a row.",
            )
        return columns

    def __str__(self) -> str:
        group = "row" if self.group_size == -1 else f"g{self.group_size}"
        inputs = ", inputs int8" if self.rounds_inputs else ""
        return f"int{self.bits} {group} {'sym' if self.symmetric else 'asym'}{inputs}"


def as_grid(scheme: object) -> Grid:
    """The scheme, where it is an affine grid. Raises TypeError for any other."""
    if not isinstance(scheme, Grid):
        raise TypeError(f"{scheme} is no affine grid")
    return scheme


@dataclass(frozen=True)
class QuantizedTensor:
    """Codes on a grid.

    codes: uint8 (out_features, in_features); scales: float32 (out_features, groups), exact in
    fp16 and bf16; zeros: uint8 (out_features, groups). groups: int64 (in_features), the group of
    each column where these aren't consecutive (GPTQ's act-order by others), else None.
    """

    grid: Grid
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    groups: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    def cpu(self) -> QuantizedTensor:
        groups = None if self.groups is None else self.groups.cpu()
        return replace(
            self,
            codes=self.codes.cpu(),
            scales=self.scales.cpu(),
            zeros=self.zeros.cpu(),
            groups=groups,
        )

    def dequantize(self) -> Tensor:
        rows, columns = self.codes.shape
        if self.groups is not None:
            zeros, scales = self.zeros.float()[:, self.groups], self.scales[:, self.groups]
            return (self.codes.float() - zeros) * scales
        value = self.codes.view(rows, self.scales.shape[1], -1).float()
        value.sub_(self.zeros[..., None]).mul_(self.scales[..., None])
        return value.view(rows, columns)


def exact_scale(scale: Tensor) -> Tensor:
    """Round positive scales (float32) to values that fp16 and bf16 both represent exactly.

    bf16 keeps 8 significant bits, which fp16 holds wherever its own exponent range does; below
    2^-14 fp16 is a fixed grid of 2^-24, on which bf16's rounding of a multiple is a multiple
    again. Zero and underflow become 2^-24, so that a division by the scale is always finite.
    """
    rounded = scale.to(torch.bfloat16).to(torch.float16).to(torch.bfloat16).float()
    return rounded.clamp(min=2.0**-24, max=float(torch.tensor(65504.0).to(torch.bfloat16)) / 2)


def fit(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scales and zero points that cover [low, high] (any shape, float32), of the same shape."""
    if grid.symmetric:
        absmax = torch.maximum(low.abs(), high.abs())
        return exact_scale(2 * absmax / grid.levels), torch.full_like(absmax, grid.middle)
    low, high = low.clamp(max=0), high.clamp(min=0)
    if grid.first_zero:  # leave room for so many steps below zero
        low = torch.minimum(low, -high * grid.first_zero / (grid.levels - grid.first_zero))
    scale = exact_scale((high - low) / grid.levels)
    if grid.exact_minimum:  # z has grid.bits of fp16's eleven
        mantissa, exponent = torch.frexp(scale)
        unit = 2.0 ** (11 - grid.bits)
        scale = torch.ldexp((mantissa * unit).round_().div_(unit), exponent)
    return scale, (-low / scale).round_().clamp_(grid.first_zero, grid.levels)


def encode(weight: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Nearest codes as float32; ``scale`` and ``zero`` broadcast against ``weight``."""
    return (weight / scale).round_().add_(zero).clamp_(0, grid.levels)


def grouped(weight: Tensor, grid: Grid) -> Tensor:
    """View (…, in) as (…, groups, columns of a group)."""
    return weight.unflatten(-1, (-1, grid.columns(weight.shape[-1])))


def search_range(
    weight: Tensor,
    grid: Grid,
    cost: Callable[[Tensor], Tensor],
    *,
    steps: int,
    smallest: float,
) -> tuple[Tensor, Tensor]:
    """Scales and zeros (out, groups) of the range with the lowest cost, for ``weight`` (out, in).

    Shrinks the range of each (row, group) from its extremes down to ``smallest`` of them, of
    which it looks at ``steps`` steps, coarsely first. ``cost`` turns the rounding error of some
    rows (rows, groups, columns), which it may overwrite, into what it costs, (rows, groups).
    Works through pieces of rows that fit in a core's cache.
    """
    groups = grouped(weight, grid)

    def search(rows: slice) -> tuple[Tensor, Tensor]:
        return _search_rows(groups[rows].contiguous(), grid, cost, steps, smallest)

    size = max(1, AT_ONCE // weight.shape[1])
    pieces = [slice(first, first + size) for first in range(0, len(weight), size)]
    scales, zeros = zip(*parallel_map(search, pieces, weight.device), strict=True)
    return torch.cat(scales), torch.cat(zeros)


def _search_rows(
    groups: Tensor, grid: Grid, cost: Callable[[Tensor], Tensor], steps: int, smallest: float
) -> tuple[Tensor, Tensor]:
    low, high = groups.amin(2), groups.amax(2)
    best_scale, best_zero = fit(low, high, grid)
    lowest = torch.full_like(best_scale, torch.inf)
    place = torch.zeros_like(best_scale)  # of the best so far, in steps
    codes, error = torch.empty_like(groups), torch.empty_like(groups)

    def attempt(step: Tensor) -> None:
        nonlocal best_scale, best_zero, lowest, place
        shrink = 1 - (1 - smallest) * step.clamp(0, steps) / steps
        scale, zero = fit(low * shrink, high * shrink, grid)
        # Codes less their zero point: between what is below zero and what is above.
        torch.div(groups, scale[..., None], out=codes).round_()
        if grid.symmetric:
            codes.clamp_(-grid.middle, grid.levels - grid.middle)
        else:
            # Ten times as fast as a clamp between tensors, which isn't vectorized.
            torch.maximum(codes, -zero[..., None], out=codes)
            torch.minimum(codes, grid.levels - zero[..., None], out=codes)
        torch.addcmul(groups, codes, scale[..., None], value=-1, out=error)
        found = cost(error)
        better = found < lowest
        lowest = torch.where(better, found, lowest)
        place = torch.where(better, step, place)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)

    # Coarsely first, then between the neighbours of what was best.
    stride = _STRIDE
    for first in range(0, steps + 1, stride):
        attempt(torch.full_like(place, first))
    while stride > 1:
        stride //= 2
        centre = place
        attempt(centre - stride)
        attempt(centre + stride)
    return best_scale, best_zero


def gram_loss(difference: Tensor, gram: Tensor) -> Tensor:
    """Squared output error of each row: diag(D G Dᵀ) for D (out, in) and G = XᵀX (in, in).

    D is float32; the product is taken in G's dtype, which may be a rougher one.
    """
    product = difference.to(gram.dtype) @ gram
    return product.float().mul_(difference).sum(1)


def total(rows: Tensor) -> float:
    """Sum of a value a row, the same for any number of threads."""
    return math.fsum(rows.tolist())


def assemble(codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> QuantizedTensor:
    """Make a QuantizedTensor of float codes (out, in) and float scales and zeros (out, groups)."""
    return QuantizedTensor(grid, codes.to(torch.uint8), scale, zero.to(torch.uint8))
