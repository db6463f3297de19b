"""Affine integer grids: the values that a weight may be rounded to, whatever chooses its code.

A weight matrix W (out_features, in_features) is cut along in_features into groups of
``group_size`` columns. Each (row, group) has a scale s and a zero point z, and its codes q
are integers from 0 to 2^bits - 1:

    w = (q - z) * s

Symmetric grids have z = 2^(bits-1) everywhere and s = 2 * absmax / (2^bits - 1); asymmetric
ones have s = (max - min) / (2^bits - 1) and z = round(-min / s), with min <= 0 <= max.
Both conventions are those of the AWQ and GPTQ formats.
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

# Weights whose ranges are searched together. A core's cache holds the copies of so many; a GPU
# computes faster than it launches, so that it needs many at once.
_AT_ONCE, _AT_ONCE_ON_GPU = 1 << 18, 1 << 26
_STRIDE = 4  # of the first, coarse search of a range; a power of two


class Quantized(Protocol):
    """A quantized weight, in whatever form its method makes."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def dequantize(self) -> Tensor:
        """The weight that the codes give back, (out_features, in_features) float32."""
        ...


@dataclass(frozen=True)
class Grid:
    """The scheme of one tensor: bits, columns per group (-1: the whole row) and symmetry.

    first_zero: the lowest zero point of an asymmetric grid, which is 1 where a format stores z - 1;
    exact_minimum: whether fp16 must hold -z·s exactly, because a format stores that;
    rounds_inputs: whether engines round the linear's inputs to int8 too, each token by itself.
    """

    bits: int
    group_size: int
    symmetric: bool
    first_zero: int = 0
    exact_minimum: bool = False
    rounds_inputs: bool = False

    @property
    def levels(self) -> int:
        """The highest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return 1 << (self.bits - 1)

    def columns(self, in_features: int) -> int:
        """Columns per group for rows of ``in_features``.

        Raises InputError where groups of that size don't divide the row.
        """
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
    """The scheme as an affine grid. Raises TypeError where it is another."""
    if not isinstance(scheme, Grid):
        raise TypeError(f"{scheme} is not an affine grid")
    return scheme


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight as codes on a grid.

    codes: (out_features, in_features) uint8; scales: (out_features, groups) float32, exact in fp16
    and bf16; zeros: the zero points, (out_features, groups) uint8; groups: the group of each
    column, (in_features,) int64, where the columns of a group aren't consecutive (checkpoints that
    other tools wrote with ``desc_act``), else None.
    """

    grid: Grid
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    groups: Tensor | None = None

    @classmethod
    def of_floats(cls, grid: Grid, codes: Tensor, scales: Tensor, zeros: Tensor) -> QuantizedTensor:
        """From codes (out, in), scales and zero points (out, groups), all float32."""
        return cls(grid, codes.to(torch.uint8), scales, zeros.to(torch.uint8))

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
        # In place, since the float32 copy of a weight is the largest thing in memory here.
        value = self.codes.view(rows, self.scales.shape[1], -1).float()
        value.sub_(self.zeros[..., None]).mul_(self.scales[..., None])
        return value.view(rows, columns)


def exact_scale(scale: Tensor) -> Tensor:
    """Round scales (any shape, float32, at least 0) to values that fp16 and bf16 both hold.

    The smallest is 2^-24, so that a division by the result is always finite.
    """
    # Formats store scales in fp16 or bf16, and engines round them again to the dtype that they
    # compute in. Scales that both hold stay what they are, so that engines compute the very weights
    # that codes were chosen for and that are judged.
    # bf16 keeps 8 significant bits, which fp16 holds wherever its own exponent range does; below
    # 2^-14 fp16 is a fixed grid of 2^-24, on which bf16's rounding of a multiple is a multiple
    # again.
    rounded = scale.to(torch.bfloat16).to(torch.float16).to(torch.bfloat16).float()
    # The largest fp16, 65504, is 65536 in bf16: half of that is the largest scale that both hold.
    return rounded.clamp(min=2.0**-24, max=2.0**15)


def fit_range(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scales and zero points with which codes cover [low, high]; all float32, of one shape."""
    if grid.symmetric:
        absmax = torch.maximum(low.abs(), high.abs())
        return exact_scale(2 * absmax / grid.levels), torch.full_like(absmax, grid.middle)
    # Zero must have a code of its own: weights that are exactly zero stay so.
    low, high = low.clamp(max=0), high.clamp(min=0)
    if grid.first_zero:
        # Zero points start at first_zero, so the range has at least that many steps below zero.
        low = torch.minimum(low, -high * grid.first_zero / (grid.levels - grid.first_zero))
    scale = exact_scale((high - low) / grid.levels)
    if grid.exact_minimum:
        # fp16 has eleven significant bits, of which z takes grid.bits in the product z·s.
        mantissa, exponent = torch.frexp(scale)
        unit = 2.0 ** (11 - grid.bits)
        scale = torch.ldexp((mantissa * unit).round_().div_(unit), exponent)
    return scale, (-low / scale).round_().clamp_(grid.first_zero, grid.levels)


def nearest_codes(weight: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """The nearest codes, float32, for ``scale`` and ``zero`` that broadcast against ``weight``."""
    return (weight / scale).round_().add_(zero).clamp_(0, grid.levels)


def weights_at_once(device: torch.device) -> int:
    """Of how many weights the ranges are searched together on ``device``."""
    return _AT_ONCE if device.type == "cpu" else _AT_ONCE_ON_GPU


def grouped(weight: Tensor, grid: Grid) -> Tensor:
    """``weight`` (…, in) as a view (…, groups, columns of a group)."""
    return weight.unflatten(-1, (-1, grid.columns(weight.shape[-1])))


def search_range(
    weight: Tensor,
    grid: Grid,
    cost: Callable[[Tensor], Tensor],
    *,
    steps: int,
    smallest: float,
) -> tuple[Tensor, Tensor]:
    """Scales and zero points (out, groups) of the ranges with the lowest cost.

    weight: (out, in) float32; cost: a function from the rounding errors of some rows, (rows,
    groups, columns), which it may overwrite, to their cost, (rows, groups); steps, smallest: the
    range of each (row, group) shrinks in ``steps`` equal steps from its extremes to that share of
    them. Not every step is tried.
    """
    groups = grouped(weight, grid)

    def search(rows: slice) -> tuple[Tensor, Tensor]:
        return _search_rows(groups[rows].contiguous(), grid, cost, steps, smallest)

    size = max(1, weights_at_once(weight.device) // weight.shape[1])
    pieces = [slice(first, first + size) for first in range(0, len(weight), size)]
    scales, zeros = zip(*parallel_map(search, pieces, weight.device), strict=True)
    return torch.cat(scales), torch.cat(zeros)


def _search_rows(
    groups: Tensor, grid: Grid, cost: Callable[[Tensor], Tensor], steps: int, smallest: float
) -> tuple[Tensor, Tensor]:
    low, high = groups.amin(2), groups.amax(2)
    best_scale, best_zero = fit_range(low, high, grid)
    lowest = torch.full_like(best_scale, torch.inf)
    best_step = torch.zeros_like(best_scale)
    codes, error = torch.empty_like(groups), torch.empty_like(groups)

    def attempt(step: Tensor) -> None:
        nonlocal best_scale, best_zero, lowest, best_step
        shrink = 1 - (1 - smallest) * step.clamp(0, steps) / steps
        scale, zero = fit_range(low * shrink, high * shrink, grid)
        # Codes minus the zero point.
        torch.div(groups, scale[..., None], out=codes).round_()
        if grid.symmetric:
            codes.clamp_(-grid.middle, grid.levels - grid.middle)
        else:
            # Ten times as fast as a clamp between tensors, which torch doesn't vectorize.
            torch.maximum(codes, -zero[..., None], out=codes)
            torch.minimum(codes, grid.levels - zero[..., None], out=codes)
        torch.addcmul(groups, codes, scale[..., None], value=-1, out=error)
        costs = cost(error)
        better = costs < lowest
        lowest = torch.where(better, costs, lowest)
        best_step = torch.where(better, step, best_step)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)

    # Every fourth step first, then those between the best and its neighbors: the cost has few
    # valleys along the range, and this takes less than half of the tries.
    stride = _STRIDE
    for first in range(0, steps + 1, stride):
        attempt(torch.full_like(best_step, first))
    while stride > 1:
        stride //= 2
        center = best_step
        attempt(center - stride)
        attempt(center + stride)
    return best_scale, best_zero


def gram_loss(difference: Tensor, gram: Tensor) -> Tensor:
    """Squared output error of each row, (out,): the diagonal of D G Dᵀ.

    difference: D, the weight's error (out, in) float32; gram: G = XᵀX (in, in), in whose dtype the
    product is computed.
    """
    product = difference.to(gram.dtype) @ gram
    return product.float().mul_(difference).sum(1)


def sum_of(values: Tensor) -> float:
    """The sum of ``values`` (n,), the same for any number of threads."""
    if values.device.type != "cpu":  # a GPU has none, and to move them would take longer
        return float(values.double().sum())
    # torch splits a sum among its threads, whose number then decides how it is rounded.
    return math.fsum(values.tolist())
