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

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.calibration.statistics import Moment
from quantkit.methods.cholesky import cholesky_
from quantkit.methods.drift import correction
from quantkit.methods.gptq.visits import Ranges, Visits
from quantkit.methods.grids import Grid, QuantizedTensor, fit_range, grouped, search_range, sum_of

_ATTEMPTS = 4  # dampings tried, each ten times the one before
_CLIP_STEPS = 20
_SMALLEST_CLIP = 0.6  # share of a group's range
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
    ridge: λ, a scalar on the device; drift: (X - Y)ᵀ Y (in, in), None where the input hasn't
    drifted.
    """

    unit: Tensor
    pivots: Tensor
    order: Tensor
    importance: Tensor
    group: int | None
    damping: float
    ridge: Tensor
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
    for attempt in range(_ATTEMPTS):
        # A failed attempt has overwritten the last one.
        factor, whole = attempt_factor(moment, settings, group, drift, threads, attempt)
        if bool(whole):
            return factor
    return None


def attempt_factor(
    moment: Moment,
    settings: GptqSettings,
    group: int | None = None,
    drift: Tensor | None = None,
    threads: int = 1,
    attempt: int = 0,
) -> tuple[Factor, Tensor]:
    """The factor with one damping, ten times the last attempt's, and whether it is one.

    The latter is a bool scalar on the device, so that a GPU needn't be waited for.
    """
    diagonal = moment.diagonal()
    mean = _mean(diagonal)
    # The order is *static*: it decides when a column is visited, never where it is stored. Groups
    # are those of the stored columns, so that engines need no permutation (``desc_act: false``).
    if not settings.activation_order:
        order = torch.arange(len(diagonal) - 1, -1, -1, device=diagonal.device)
    elif group:
        order = _by_groups(diagonal, group)
    else:
        order = torch.argsort(diagonal, stable=True)
    hessian = moment.matrix(order)
    damping = settings.damping * 10**attempt
    hessian.diagonal().add_(damping * mean)
    whole = cholesky_(hessian, threads)
    pivots = hessian.diagonal().clone()
    # The pivot is the share of a column's error that later columns can't compensate for. Scales
    # weighted by it fit the calibration tokens more closely than scales weighted by the energy:
    # with four bits and more so closely that other text suffers (docs/quality.md, "Affine grids").
    importance = pivots if group else diagonal[order].sqrt()
    factor = Factor(
        # Divided once, so that no column of any weight has to be divided by its pivot.
        unit=hessian.div_(pivots),
        pivots=pivots,
        order=order,
        importance=importance,
        group=group,
        damping=damping,
        ridge=damping * mean,
        drift=drift,
    )
    return factor, whole


def heavy_tailed(moment: Moment) -> Tensor:
    """Whether few features of the input have most of its energy, a bool scalar on the device.

    Then to visit their columns first matters more than to choose scales late.
    """
    diagonal = moment.diagonal()
    return diagonal.median() < _HEAVY_TAIL * _mean(diagonal)


def _mean(diagonal: Tensor) -> Tensor:
    # Above zero, so that an input that is always zero is damped as well.
    return diagonal.mean().clamp(min=torch.finfo(diagonal.dtype).tiny)


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
    if factor.group is None:
        block = settings.block_size
        # All ranges are chosen before any column is visited, for the original weights in the order
        # in which they are stored.
        importance = torch.empty_like(factor.importance)
        importance[order] = factor.importance
        ranges = Ranges.of(grid, *_choose_ranges(weight.float(), grid, importance, settings))
    else:
        # A block is a group, whose ranges are chosen when it is reached, for its targets: these are
        # what will really be rounded.
        block = factor.group
        empty = work.new_empty(len(weight), len(order) // block)
        ranges = Ranges.of(grid, empty, empty.clone())  # filled group by group
    groups = order // grid.columns(weight.shape[1])
    visits = Visits.of(unit, factor.pivots, ranges, groups, original, work)
    for end in range(len(order), 0, -block):
        start = max(0, end - block)
        if factor.group is not None:
            targets, importance = work[start:end].t().contiguous(), factor.importance[start:end]
            ranges.put(groups[start:][:1], *_choose_ranges(targets, grid, importance, settings))
        visits.block(start, end)
    stored = torch.empty_like(visits.codes)
    stored[order] = visits.codes
    scales, zeros = ranges.scales.t().contiguous(), ranges.zeros.t().to(torch.uint8).contiguous()
    tensor = QuantizedTensor(grid, stored.t().contiguous(), scales, zeros)
    losses = visits.losses
    if factor.drift is None:
        # The squares are D (G + λI) Dᵀ; the output error is D G Dᵀ.
        losses.sub_(visits.distances * factor.ridge).clamp_(min=0)
    return RoundedRows(tensor, losses, factor.damping)
