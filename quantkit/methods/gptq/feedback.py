"""GPTQ's arithmetic: codes are chosen column by column, and later columns compensate for errors.

Frantar et al., arXiv 2210.17323, in the form of Babai's nearest plane (Chen et al., arXiv
2507.18553), which chooses the same codes without inverting anything. With G = XᵀX over the
calibration tokens, the damped hessian H = G + λI = L Lᵀ and D = W - Ŵ, the output error is the
squared norm of D L, whose column k is L_kk D_k + Σ_{i>k} D_i L_ik. Columns are visited from the
last to the first. So column k is best rounded after Σ_{i>k} D_i L_ik / L_kk is added to it: that is
its *target*. What rounding leaves of the target is its *residual*; times L_kk, squared and summed
over all columns, it is the loss.

Where inputs have drifted, the targets are moved as well (``methods.drift``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantkit.calibration.statistics import Moment
from quantkit.methods.cholesky import cholesky_
from quantkit.methods.drift import correction
from quantkit.methods.grids import Grid, QuantizedTensor, fit_range, grouped, search_range, sum_of

_ATTEMPTS = 4  # dampings tried, each ten times the one before
_CLIP_STEPS = 20
_SMALLEST_CLIP = 0.6  # share of a group's range
# Columns are visited one at a time, and update others by matrix products as late as possible: the
# columns of the same block after every eighth, all other columns after every block.
_INNER = 8
_HEAVY_TAIL = 0.6  # median energy over mean, below which scales aren't chosen late


@dataclass(frozen=True)
class GptqSettings:
    """How GPTQ works.

    damping: λ as a share of the mean diagonal of G; activation_order: whether columns are visited
    by falling energy, which is the diagonal of G; clip_search: whether the ranges of groups may
    shrink; block_size: columns after which all others are updated.
    """

    damping: float = 0.01
    activation_order: bool = True
    clip_search: bool = True
    block_size: int = 128


@dataclass(frozen=True)
class Factor:
    """The damped hessian H = L Lᵀ of one input, for all linears that read it.

    order: the columns of the weight in the order of L, (in,) int64, of which the last is visited
    first; unit: L with each column divided by its diagonal element, (in, in); pivots: that diagonal
    (in,); importance: by what a column's error is multiplied in the choice of scales, (in,), in the
    same order; group: columns of a group, where groups are visited one after the other and a scale
    is chosen when its group is reached, else None; damping: λ as a share of the mean diagonal of G;
    ridge: λ; drift: (X - Y)ᵀ Y (in, in), None where the input hasn't drifted.
    """

    unit: Tensor
    pivots: Tensor
    order: Tensor
    importance: Tensor
    group: int | None
    damping: float
    ridge: float
    drift: Tensor | None = None


@dataclass(frozen=True)
class RoundedRows:
    """Quantized rows of a weight.

    losses: squared output error of each row, (out,); of the corrected weight and with λ counted,
    where inputs have drifted; damping: that of the factor, None where the hessian has no factor and
    the codes are the nearest.
    """

    tensor: QuantizedTensor
    losses: Tensor
    damping: float | None

    @property
    def loss(self) -> float:
        """The squared output error of all rows."""
        return sum_of(self.losses)


def factorize(
    moment: Moment,
    settings: GptqSettings,
    group: int | None = None,
    drift: Tensor | None = None,
    threads: int = 1,
) -> Factor | None:
    """Factorize the damped hessian; None where no damping makes it positive definite.

    moment: of the input; group: columns of a group, where scales may be chosen late; drift:
    (X - Y)ᵀ Y (in, in), where the moment is that of Y, which the quantized model reads in place of
    X.
    """
    diagonal = moment.diagonal()
    # Above zero, so that an input that is always zero is damped as well.
    mean = diagonal.mean().clamp(min=torch.finfo(diagonal.dtype).tiny)
    # Where few columns, anywhere in the matrix, have most of the energy, visiting them first
    # matters more than choosing scales late.
    if group and settings.activation_order and bool(diagonal.median() < _HEAVY_TAIL * mean):
        group = None
    # The order is *static*: it decides when a column is visited, never where it is stored. Groups
    # are those of the stored columns, so that engines need no permutation (``desc_act: false``).
    if not settings.activation_order:
        order = torch.arange(len(diagonal) - 1, -1, -1, device=diagonal.device)
    elif group:
        order = _by_groups(diagonal, group)
    else:
        order = torch.argsort(diagonal, stable=True)
    for attempt in range(_ATTEMPTS):
        # A failed attempt has overwritten the last one.
        hessian = moment.matrix(order)
        damping = settings.damping * 10**attempt
        hessian.diagonal().add_(damping * mean)
        if cholesky_(hessian, threads):
            pivots = hessian.diagonal().clone()
            ridge = float(damping * mean)
            # The pivot is the share of a column's error that later columns can't compensate for.
            # Scales weighted by it fit the calibration tokens more closely than scales weighted by
            # the energy: with four bits and more so closely that other text suffers
            # (docs/quality.md, "Affine grids").
            importance = pivots if group else diagonal[order].sqrt()
            # Divided once, so that no column of any weight has to be divided by its pivot.
            unit = hessian.div_(pivots)
            return Factor(
                unit=unit,
                pivots=pivots,
                order=order,
                importance=importance,
                group=group,
                damping=damping,
                ridge=ridge,
                drift=drift,
            )
    return None


def _by_groups(energy: Tensor, group: int) -> Tensor:
    """The columns, (in,), with groups by rising energy, and by rising energy within each group."""
    columns = torch.arange(len(energy), device=energy.device).view(-1, group)
    columns = columns.gather(1, torch.argsort(energy[columns], stable=True))
    return columns[torch.argsort(energy[columns].sum(1), stable=True)].flatten()


def _target_shifts(weight: Tensor, factor: Factor, drift: Tensor) -> Tensor:
    """What drift adds to each column's target, (in, out), in the order of the factor."""
    product = correction(weight, drift, factor.order).t()
    shifts = torch.linalg.solve_triangular(factor.unit, product, upper=False, unitriangular=True)
    return shifts.div_(factor.pivots.square()[:, None])


def _choose_ranges(
    weight: Tensor, grid: Grid, importance: Tensor, settings: GptqSettings
) -> tuple[Tensor, Tensor]:
    """Scales and zero points (out, groups) for ``weight`` (out, in) float32."""
    groups = grouped(weight, grid)
    if not settings.clip_search:
        return fit_range(groups.amin(2), groups.amax(2), grid)
    importance = importance.view(groups.shape[1:])
    return search_range(
        weight,
        grid,
        lambda error: torch.linalg.vector_norm(error.mul_(importance), dim=2),
        steps=_CLIP_STEPS,
        smallest=_SMALLEST_CLIP,
    )


def quantize_rows(
    weight: Tensor, factor: Factor, grid: Grid, settings: GptqSettings
) -> RoundedRows:
    """Quantize ``weight`` (out, in), rows of any float dtype that read the factor's input."""
    order, unit = factor.order, factor.unit
    # Transposed to (in, out), so that a column is contiguous, in the order of the factor.
    original = weight.float().index_select(1, order).t().contiguous()
    # The targets: they change with the error of every column that is visited.
    work = original.clone()
    if factor.drift is not None:
        work += _target_shifts(weight, factor, factor.drift)
    # A list of numbers: to read one from a tensor at each column would wait for the device.
    group_of = (order // grid.columns(weight.shape[1])).tolist()
    if factor.group is None:
        block = settings.block_size
        # All ranges are chosen before any column is visited, for the original weights in the order
        # in which they are stored.
        importance = torch.empty_like(factor.importance)
        importance[order] = factor.importance
        ranges = _Ranges.of(grid, *_choose_ranges(weight.float(), grid, importance, settings))
    else:
        # A block is a group, whose ranges are chosen when it is reached, for its targets: these are
        # what will really be rounded.
        block = factor.group
        empty = work.new_empty(len(weight), len(order) // block)
        ranges = _Ranges.of(grid, empty, empty.clone())  # filled group by group
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    loss, distance = torch.zeros(2, work.shape[1], device=work.device)
    for end in range(len(order), 0, -block):
        start = max(0, end - block)
        if factor.group is not None:
            targets, importance = work[start:end].t().contiguous(), factor.importance[start:end]
            ranges.put(group_of[start], *_choose_ranges(targets, grid, importance, settings))
        errors = torch.empty_like(work[start:end])
        steps = torch.empty_like(errors)
        for high in range(end, start, -_INNER):
            low = max(start, high - _INNER)
            part = slice(low - start, high - start)
            _visit(
                work[low:high],
                original[low:high],
                unit[low:high, low:high],
                ranges,
                group_of[low:high],
                errors[part],
                steps[part],
            )
            work[start:low].addmm_(unit[low:high, start:low].t(), errors[part])
        work[:start].addmm_(unit[start:end, :start].t(), errors)
        # ``_visit`` has left the residuals in the place of the targets.
        residual = work[start:end].mul_(factor.pivots[start:end, None])
        loss += residual.square_().sum(0)
        distance += errors.square_().sum(0)
        codes[start:end] = steps.add_(ranges.zeros[group_of[start:end]])
    stored = torch.empty_like(codes)
    stored[order] = codes
    scales, zeros = ranges.scales.t().contiguous(), ranges.zeros.t().to(torch.uint8).contiguous()
    tensor = QuantizedTensor(grid, stored.t().contiguous(), scales, zeros)
    if factor.drift is None:
        # The squares above are D (G + λI) Dᵀ; the output error is D G Dᵀ.
        loss.sub_(distance, alpha=factor.ridge).clamp_(min=0)
    return RoundedRows(tensor, loss, factor.damping)


@dataclass(frozen=True)
class _Ranges:
    """Scales, zero points, and the lowest and highest codes minus the zero point.

    All are (groups, out) float32, so that those of one group are contiguous.
    """

    grid: Grid
    scales: Tensor
    zeros: Tensor
    lowest: Tensor
    highest: Tensor

    @classmethod
    def of(cls, grid: Grid, scale: Tensor, zero: Tensor) -> _Ranges:
        """From scales and zero points (out, groups)."""
        zeros = zero.t().contiguous()
        return cls(grid, scale.t().contiguous(), zeros, -zeros, grid.levels - zeros)

    def put(self, group: int, scale: Tensor, zero: Tensor) -> None:
        """Set those of one group, (out, 1)."""
        zeros = zero[:, 0]
        self.scales[group], self.zeros[group] = scale[:, 0], zeros
        self.lowest[group], self.highest[group] = -zeros, self.grid.levels - zeros


def _visit(
    work: Tensor,
    original: Tensor,
    unit: Tensor,
    ranges: _Ranges,
    groups: Sequence[int],
    errors: Tensor,
    steps: Tensor,
) -> None:
    """Choose the codes of a few columns, from the last to the first.

    work: the targets; original: the weight; unit: L's part for these columns, (columns, columns);
    groups: the group of each column. The others are (columns, out). On return ``work`` holds the
    residual of each target, ``errors`` the weight minus its rounded values, and ``steps`` the codes
    minus the zero points.
    """
    # The vectors are so short that the overhead of each call decides, which is much smaller in
    # numpy than in torch. torch has functions of the same names for other devices.
    xp: Any = torch
    rint: Any = torch.round
    arrays: list[Any] = [work, original, unit, ranges.scales, ranges.lowest, ranges.highest]
    arrays += [errors, steps]
    if work.device.type == "cpu":
        xp, rint, arrays = np, np.rint, [array.numpy() for array in arrays]
    targets, originals, factors, scales, lowest, highest, all_errors, all_steps = arrays
    # The first row holds a column's value until the products below overwrite it.
    change = xp.empty_like(targets)
    for k in range(len(groups) - 1, -1, -1):
        target, error, step, group = targets[k], all_errors[k], all_steps[k], groups[k]
        xp.divide(target, scales[group], out=step)
        rint(step, out=step)
        xp.maximum(step, lowest[group], out=step)
        xp.minimum(step, highest[group], out=step)
        value = xp.multiply(step, scales[group], out=change[0])
        xp.subtract(originals[k], value, out=error)
        xp.subtract(target, value, out=target)
        if k:
            xp.multiply(factors[k, :k, None], error, out=change[:k])
            xp.add(targets[:k], change[:k], out=targets[:k])
