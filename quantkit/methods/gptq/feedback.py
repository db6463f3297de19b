"""GPTQ: codes chosen column by column, each column's error carried on to those that follow.

Frantar et al., arXiv 2210.17323, in the form of Babai's nearest plane (Chen et al., arXiv
2507.18553), which chooses the same codes without inverting anything. With G = XᵀX over the
calibration tokens, H = G + λI = L Lᵀ and D = W - Ŵ, the output error is the squared norm of D L,
whose column k is L_kk D_k + Σ_{i>k} D_i L_ik. Visiting the columns from the last to the first,
column k is therefore best rounded after adding Σ_{i>k} D_i L_ik / L_kk to it. What that leaves,
squared and summed, is the loss.

Columns are done in blocks: inside a block one at a time, the rest of the matrix once per block
by a matrix product.

Activation order is *static*: columns are visited by falling diagonal of G, but the groups and
their scales are those of the stored order, so that engines see no permutation (``desc_act:
false``, g_idx = k // group_size). Scales are chosen before any column is visited. With three bits
or fewer it is better to choose a group's scale when the group is reached, for the weights that
will really be rounded; then whole groups are visited by falling energy, and the columns in them.

Where the inputs have drifted, each column's target is moved too (``methods.drift``).
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
from quantkit.methods.grids import Grid, QuantizedTensor, fit, grouped, search_range, total

_RETRIES = 4  # dampings tried, each ten times the one before
_CLIP_STEPS = 20
_SMALLEST_CLIP = 0.6  # share of a group's range
_INNER = 8  # columns between two products inside a block
_HEAVY_TAIL = 0.6  # median energy over mean, below which scales aren't chosen late


@dataclass(frozen=True)
class Settings:
    """How GPTQ is to work.

    damping: share of the Hessian's mean diagonal that is added to the diagonal; activation_order:
    whether columns are visited by falling energy; clip_search: whether ranges may shrink;
    block_size: columns between two updates of the rest of the matrix.
    """

    damping: float = 0.01
    activation_order: bool = True
    clip_search: bool = True
    block_size: int = 128


@dataclass(frozen=True)
class Factor:
    """L with H = L Lᵀ in ``order``, whose last column is visited first.

    unit: L with each column divided by its diagonal element, so that the diagonal is 1; pivots:
    that diagonal; importance: the weight of a column's error in the choice of scales; group:
    columns of a group, where groups are visited one after the other and a scale is chosen when its
    group is reached, else None; damping: share of the mean diagonal; ridge: λ; drift: (X - Y)ᵀ Y,
    None where inputs haven't drifted. All linears that read an input share its factor.
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
class Rounded:
    """Quantized rows of a weight.

    losses: Gram loss of each row, (out,), where inputs have drifted of the corrected weights and
    with the damping counted; damping: the share that was needed to factorize the Hessian, None
    where that was impossible and the codes are the nearest.
    """

    tensor: QuantizedTensor
    losses: Tensor
    damping: float | None

    @property
    def loss(self) -> float:
        return total(self.losses)


def factorize(
    moment: Moment,
    settings: Settings,
    group: int | None = None,
    drift: Tensor | None = None,
    threads: int = 1,
) -> Factor | None:
    """Factorize a Gram matrix (in, in); None when no damping makes it positive definite.

    group: columns of the linears' groups, where choosing their scales late may be better;
    drift: (X - Y)ᵀ Y (in, in), where the moment is of Y, which the quantized model reads, and X is
    what the unquantized one reads.
    """
    diagonal = moment.diagonal()
    mean = diagonal.mean().clamp(min=torch.finfo(diagonal.dtype).tiny)
    if group and settings.activation_order and bool(diagonal.median() < _HEAVY_TAIL * mean):
        # A few columns all over the matrix have most of the energy: that they come first
        # matters more than late scales.
        group = None
    if not settings.activation_order:
        order = torch.arange(len(diagonal) - 1, -1, -1, device=diagonal.device)
    elif group:
        order = _by_groups(diagonal, group)
    else:
        order = torch.argsort(diagonal, stable=True)
    for attempt in range(_RETRIES):
        hessian = moment.matrix(order)
        damping = settings.damping * 10**attempt
        hessian.diagonal().add_(damping * mean)
        if cholesky_(hessian, threads):
            pivots = hessian.diagonal().clone()
            ridge = float(damping * mean)
            # The pivot is the part of a column's error that later columns can't make up for.
            # Weighted by it, scales fit the calibration tokens more closely: with four bits and
            # more, so closely that held-out text suffers.
            importance = pivots if group else diagonal[order].sqrt()
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
    """Groups by rising energy, and columns within them."""
    columns = torch.arange(len(energy), device=energy.device).view(-1, group)
    columns = columns.gather(1, torch.argsort(energy[columns], stable=True))
    return columns[torch.argsort(energy[columns].sum(1), stable=True)].flatten()


def _moved(weight: Tensor, factor: Factor, drift: Tensor) -> Tensor:
    """How far each column's target is moved, in the order of the factor, (in, out)."""
    wanted = correction(weight, drift, factor.order).t()
    moved = torch.linalg.solve_triangular(factor.unit, wanted, upper=False, unitriangular=True)
    return moved.div_(factor.pivots.square()[:, None])


def _fit(
    weight: Tensor, grid: Grid, importance: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Scales and zeros (out, groups) of ``weight`` (out, in)."""
    groups = grouped(weight, grid)
    if not settings.clip_search:
        return fit(groups.amin(2), groups.amax(2), grid)
    importance = importance.view(groups.shape[1:])
    return search_range(
        weight,
        grid,
        lambda error: torch.linalg.vector_norm(error.mul_(importance), dim=2),
        steps=_CLIP_STEPS,
        smallest=_SMALLEST_CLIP,
    )


def feedback(weight: Tensor, factor: Factor, grid: Grid, settings: Settings) -> Rounded:
    """Quantize ``weight`` (out, in; any float dtype)."""
    order, unit = factor.order, factor.unit
    # Transposed, so that a column is contiguous: (in, out), rows in visiting order.
    original = weight.float().index_select(1, order).t().contiguous()
    # The values to round: the originals plus the errors of the columns visited so far.
    work = original.clone()
    if factor.drift is not None:
        work += _moved(weight, factor, factor.drift)
    group_of = (order // grid.columns(weight.shape[1])).tolist()
    if factor.group is None:
        block = settings.block_size
        importance = torch.empty_like(factor.importance)
        importance[order] = factor.importance
        ranges = _Ranges.of(grid, *_fit(weight.float(), grid, importance, settings))
    else:
        block = factor.group
        empty = work.new_empty(len(weight), len(order) // block)
        ranges = _Ranges.of(grid, empty, empty.clone())
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    loss, distance = torch.zeros(2, work.shape[1], device=work.device)
    for end in range(len(order), 0, -block):
        start = max(0, end - block)
        if factor.group is not None:
            targets, importance = work[start:end].t().contiguous(), factor.importance[start:end]
            ranges.put(group_of[start], *_fit(targets, grid, importance, settings))
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
        residual = work[start:end].mul_(factor.pivots[start:end, None])
        loss += residual.square_().sum(0)
        distance += errors.square_().sum(0)
        codes[start:end] = steps.add_(ranges.zeros[group_of[start:end]])
    stored = torch.empty_like(codes)
    stored[order] = codes
    scales, zeros = ranges.scales.t().contiguous(), ranges.zeros.t().to(torch.uint8).contiguous()
    tensor = QuantizedTensor(grid, stored.t().contiguous(), scales, zeros)
    if factor.drift is None:
        # The squares above are D (G + λI) Dᵀ; the Gram loss is D G Dᵀ.
        loss.sub_(distance, alpha=factor.ridge).clamp_(min=0)
    return Rounded(tensor, loss, factor.damping)


@dataclass(frozen=True)
class _Ranges:
    """Scales, zero points, and the lowest and highest codes minus the zero point; (groups, out)."""

    grid: Grid
    scales: Tensor
    zeros: Tensor
    lowest: Tensor
    highest: Tensor

    @classmethod
    def of(cls, grid: Grid, scale: Tensor, zero: Tensor) -> _Ranges:
        """From scales and zeros (out, groups)."""
        zeros = zero.t().contiguous()
        return cls(grid, scale.t().contiguous(), zeros, -zeros, grid.levels - zeros)

    def put(self, group: int, scale: Tensor, zero: Tensor) -> None:
        """Set one group's, (out, 1)."""
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

    All are (columns, out) but ``unit``, (columns, columns). On return ``work`` holds the residual
    of each target, ``errors`` the originals minus their rounded values, ``steps`` the codes minus
    the zero points.
    """
    # These vectors are so short that the cost of a call decides, which numpy's functions have
    # little of. On other devices than a CPU torch's functions of the same names are used.
    xp: Any = torch
    rint: Any = torch.round
    arrays: list[Any] = [work, original, unit, ranges.scales, ranges.lowest, ranges.highest]
    arrays += [errors, steps]
    if work.device.type == "cpu":
        xp, rint, arrays = np, np.rint, [array.numpy() for array in arrays]
    targets, originals, factors, scales, lowest, highest, all_errors, all_steps = arrays
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
