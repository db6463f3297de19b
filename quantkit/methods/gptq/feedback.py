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
false``, g_idx = k // group_size). Scales are chosen before. With three bits and fewer it pays more
to choose a group's scale when the group is reached, for the weights that will really be rounded;
then whole groups are visited by falling energy, and the columns within them.

Where inputs have drifted, each column's target is moved besides (``drift``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from quantkit.methods.cholesky import cholesky_
from quantkit.methods.drift import pull
from quantkit.methods.grids import Grid, QuantizedTensor, fit, grouped, search_range

if TYPE_CHECKING:
    from quantkit.calibration.statistics import Moment

_RETRIES = 4  # dampings tried, each ten times the one before
_CLIP_STEPS = 20
_SMALLEST_CLIP = 0.6  # share of a group's range
_INNER = 8  # columns between two products inside a block
_HEAVY_TAIL = 0.6  # median energy over mean, below which scales aren't chosen late


@dataclass(frozen=True)
class Settings:
    """damping: share of the mean diagonal added to it; block_size: columns per lazy update."""

    damping: float = 0.01
    activation_order: bool = True
    clip_search: bool = True
    block_size: int = 128


@dataclass(frozen=True)
class Factor:
    """L with H = L Lᵀ in ``order``, whose last column is visited first.

    unit: L with each column divided by its diagonal element, so that the diagonal is 1; pivots:
    that diagonal; importance: what a column's error counts in the choice of scales; group: columns
    of a group, where groups are visited one after the other and scales chosen when they are
    reached, else None; damping: share of the mean diagonal; ridge: λ; drift: (X - Y)ᵀ Y, None
    where inputs haven't drifted. Shared by all readers of an input.
    """

    unit: Tensor
    pivots: Tensor
    order: Tensor
    importance: Tensor
    group: int | None
    damping: float
    ridge: float
    drift: Tensor | None = None


def factorize(
    moment: Moment,
    settings: Settings,
    group: int | None = None,
    drift: Tensor | None = None,
    threads: int = 1,
) -> Factor | None:
    """Factorize a Gram matrix (in, in); None when no damping makes it positive definite.

    group: columns of the readers' groups, where choosing their scales late may pay;
    drift: (X - Y)ᵀ Y (in, in), where the moment is of Y and was to be of X.
    """
    diagonal = moment.diagonal()
    mean = diagonal.mean().clamp(min=torch.finfo(diagonal.dtype).tiny)
    if group and settings.activation_order and bool(diagonal.median() < _HEAVY_TAIL * mean):
        group = None  # a few columns count, all over the matrix: their order matters more
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
            # With its pivot, the part of a column's error that later columns can't fix, scales fit
            # the calibration tokens more closely: with four bits and more, too closely.
            importance = pivots if group else diagonal[order].sqrt()
            unit = hessian.div_(pivots)
            return Factor(unit, pivots, order, importance, group, damping, ridge, drift)
    return None


def _by_groups(energy: Tensor, group: int) -> Tensor:
    """Groups by rising energy, and columns within them."""
    columns = torch.arange(len(energy), device=energy.device).view(-1, group)
    columns = columns.gather(1, torch.argsort(energy[columns], stable=True))
    return columns[torch.argsort(energy[columns].sum(1), stable=True)].flatten()


def _moved(weight: Tensor, factor: Factor, drift: Tensor) -> Tensor:
    """How far each column's target is moved, in the order of the factor, (in, out)."""
    pulled = pull(weight, drift, factor.order).t()
    found = torch.linalg.solve_triangular(factor.unit, pulled, upper=False, unitriangular=True)
    return found.div_(factor.pivots.square()[:, None])


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


def feedback(
    weight: Tensor, factor: Factor, grid: Grid, settings: Settings
) -> tuple[QuantizedTensor, Tensor]:
    """Quantize ``weight`` (out, in; any float dtype). Its tensor, and each row's Gram loss (out,);
    where inputs have drifted, the loss of the corrected weights, which counts λ too."""
    order, unit = factor.order, factor.unit
    # Transposed, so that a column is contiguous: (in, out), rows in visiting order.
    original = weight.float().index_select(1, order).t().contiguous()
    work = original.clone()  # with the errors of the columns visited added
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
            due, importance = work[start:end].t().contiguous(), factor.importance[start:end]
            ranges.put(group_of[start], *_fit(due, grid, importance, settings))
        errors = torch.empty_like(work[start:end])
        taken = torch.empty_like(errors)
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
                taken[part],
            )
            work[start:low].addmm_(unit[low:high, start:low].t(), errors[part])
        work[:start].addmm_(unit[start:end, :start].t(), errors)
        left = work[start:end].mul_(factor.pivots[start:end, None])
        loss += left.square_().sum(0)
        distance += errors.square_().sum(0)
        taken += ranges.zeros[group_of[start:end]]
        codes[start:end] = taken
    stored = torch.empty_like(codes)
    stored[order] = codes
    scales, zeros = ranges.scales.t().contiguous(), ranges.zeros.t().to(torch.uint8).contiguous()
    tensor = QuantizedTensor(grid, stored.t().contiguous(), scales, zeros)
    if factor.drift is None:
        loss.sub_(distance, alpha=factor.ridge).clamp_(min=0)
    return tensor, loss


@dataclass(frozen=True)
class _Ranges:
    """Scales, zero points and the lowest and highest codes less these, each (groups, out)."""

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
    taken: Tensor,
) -> None:
    """Choose the codes of a few columns, from the last to the first.

    All are (columns, out) but ``unit``, (columns, columns). ``work`` becomes what is left of
    each target, ``errors`` the original less what was taken, ``taken`` codes less zero points.

    So short are these vectors that what counts is the cost of a call, of which numpy's is a
    fraction of torch's; elsewhere than on a CPU it is torch's functions of the same names.
    """
    xp: Any = torch
    rint: Any = torch.round
    arrays: list[Any] = [work, original, unit, ranges.scales, ranges.lowest, ranges.highest]
    arrays += [errors, taken]
    if work.device.type == "cpu":
        xp, rint, arrays = np, np.rint, [array.numpy() for array in arrays]
    targets, originals, factors, scales, lowest, highest, wrong, steps = arrays
    change = xp.empty_like(targets)
    for k in range(len(groups) - 1, -1, -1):
        target, error, step, group = targets[k], wrong[k], steps[k], groups[k]
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
