"""GPTQ's error feedback on ggml's own grids: types that every llama.cpp reads, better chosen codes.

Let H = XᵀX + λI be the damped hessian over the calibration tokens, and H = V Vᵀ with V upper
triangular. The loss of a difference D = W - Ŵ is ‖D V‖², and column k of D V is
V_kk D_k + Σ_{i<k} D_i V_ik. So columns are visited one after the other, and each is rounded from
its *target*, the value that would make its column of D V vanish: GPTQ (Frantar et al., arXiv
2210.17323), seen as Babai's nearest plane (Chen et al., arXiv 2507.18553), with one factorization
and no inverse of H.

The units (d, dmin) of a block are fixed first. The integers of a group are chosen when the group
is reached, for its targets; then its columns are visited, and the integers are fitted to the codes
once more. Groups are visited by falling energy, and so are the columns within a group: that order
needs no room in the file. Where few inputs have most of the energy (as before down projections) a
second round follows, with the scales of the first, through all columns by falling energy.

Where inputs have drifted, the targets are moved as well (``methods.drift``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.base.errors import InputError
from quantkit.base.parallel import multiplies_bfloat16
from quantkit.calibration.statistics import Moment
from quantkit.methods.cholesky import cholesky_
from quantkit.methods.drift import correction
from quantkit.methods.fused import fused
from quantkit.methods.ggml.blocks import LAYOUTS
from quantkit.methods.ggml.scales import CodeRounding, Scales, rounding_of
from quantkit.methods.ggml.types import GgmlTensor, row_bytes
from quantkit.methods.ggml.visits import visit_panels
from quantkit.methods.grids import sum_of

FEEDBACK_TYPES = tuple(LAYOUTS)  # those whose codes are chosen one at a time
WIDEST_GROUP = 32  # columns; the others have 16. The width of an input must be a multiple
_BLOCK = 256  # columns between matrix products with all that were visited before
ROWS_AT_ONCE = 4096  # quantized together, which bounds the memory: no row depends on another
NOT_FINITE = "the weight holds NaN or infinity"
_ATTEMPTS = 4  # dampings tried, each ten times the one before
_HEAVY_TAIL = 0.6  # median energy over mean, below which the second round pays (docs/quality.md)


@dataclass(frozen=True)
class OrderedFactor:
    """V for one order of visits.

    columns: those of the weight in that order, (in,) int64; upper: V (in, in) in the same order.
    """

    columns: Tensor
    upper: Tensor


@dataclass(frozen=True)
class Factorization:
    """The hessian of one input, factorized for all weights that read it, of any type.

    grouped: for the order in which the columns of a group stay together; free: for the order by
    falling energy alone, None where a second round wouldn't pay; mean: the mean diagonal of XᵀX,
    a scalar, by which H was divided; damping: λ as a share of it; drift: (X - Y)ᵀ Y (in, in), not
    divided, None where the input hasn't drifted.
    """

    grouped: OrderedFactor
    free: OrderedFactor | None
    mean: Tensor
    damping: float
    drift: Tensor | None = None


@dataclass(frozen=True)
class RoundedRows:
    """Quantized rows: blocks (rows, bytes) uint8; losses: of each row, (rows,) float32, divided by
    the mean diagonal as the hessian is."""

    blocks: Tensor
    losses: Tensor


@dataclass(frozen=True)
class RoundedMatrix:
    """A quantized weight, and its loss tr(D G Dᵀ) with D = W - Ŵ and G = XᵀX."""

    tensor: GgmlTensor
    loss: float


def factorize_orders(
    moment: Moment, damping: float = 0.01, drift: Tensor | None = None, threads: int = 1
) -> Factorization | None:
    """Factorize the damped hessian of an input for one or two orders of visits.

    moment: of the input, whose width is a multiple of 32; damping: λ as a share of the mean
    diagonal; drift: (X - Y)ᵀ Y (in, in), where the moment is that of Y, which the quantized model
    reads in place of X. It is on the CPU, or on the moment's device where kernels compute there.
    None where no damping, up to a thousand times ``damping``, makes the hessian positive definite:
    where it holds NaN or infinity, or where the input is always zero. Raises InputError for another
    width.
    """
    if not 0 < float(_energy(moment).mean()) < float("inf"):
        return None
    heavy = bool(heavy_tailed(moment))
    for attempt in range(_ATTEMPTS):
        factors, whole = attempt_orders(moment, damping * 10**attempt, drift, threads, heavy=heavy)
        first, *second = whole.tolist()
        if first:
            return factors if all(second) else replace(factors, free=None)
    return None


def attempt_orders(
    moment: Moment, damping: float, drift: Tensor | None, threads: int = 1, *, heavy: bool
) -> tuple[Factorization, Tensor]:
    """The same with one damping, and for each order whether the hessian has that factor.

    heavy: of ``heavy_tailed``. The latter result, of bools (orders,), is on the device, so that a
    GPU needn't be waited for.
    """
    energy = _energy(moment)
    if len(energy) % WIDEST_GROUP:
        raise InputError(
            f"a Gram matrix of {len(energy)} features doesn't fit groups of {WIDEST_GROUP}"
        )
    mean = energy.mean()
    # H is divided by the mean diagonal of XᵀX, so that λ is the share itself.
    grouped, whole = _factorize(moment, _by_groups(energy), mean, damping, threads)
    free, found = None, [whole]
    # A second factorization, for the second round: it pays where few inputs have most of the
    # energy, as before down projections, and loses elsewhere (docs/quality.md).
    if heavy:
        free, whole = _factorize(moment, _falling(energy), mean, damping, threads)
        found.append(whole)
    if drift is not None:
        drift = _compact(drift, energy.device)
    return Factorization(grouped, free, mean, damping, drift), torch.stack(found)


def heavy_tailed(moment: Moment) -> Tensor:
    """Whether few features of the input have most of its energy, a bool scalar on the device."""
    energy = _energy(moment)
    return energy.median() < (_HEAVY_TAIL * energy.mean().double()).float()


def quantize_with_feedback(weight: Tensor, factors: Factorization, type: str) -> RoundedMatrix:
    """Quantize ``weight`` (out, in), of any float dtype, to one of ``FEEDBACK_TYPES``.

    Where drift is corrected, the loss is that of the corrected weight, and counts λ too. Raises
    InputError for another type, for rows that its blocks don't divide, for factors of another width
    and for NaN or infinity.
    """
    if type not in FEEDBACK_TYPES:
        raise InputError(
            f"{type} can't be quantized with error feedback",
            fix=f"Types that can: {', '.join(FEEDBACK_TYPES)}.",
        )
    row_bytes(type, weight.shape[-1])
    if weight.ndim != 2 or weight.shape[1] != len(factors.grouped.columns):
        raise InputError(
            f"a weight of shape {tuple(weight.shape)} doesn't fit the "
            f"{len(factors.grouped.columns)} measured input features"
        )
    if not bool(weight.isfinite().all()):
        raise InputError(NOT_FINITE)
    parts = [quantize_rows(rows, factors, type) for rows in weight.split(ROWS_AT_ONCE)]
    blocks = torch.cat([part.blocks for part in parts])
    mean = float(factors.mean)
    loss = math.fsum(sum_of(part.losses) * mean for part in parts)
    return RoundedMatrix(GgmlTensor(type, blocks.cpu(), tuple(weight.shape)), loss)


def quantize_rows(weight: Tensor, factors: Factorization, type: str) -> RoundedRows:
    """The same for some rows at once, unchecked; the result is on the device of ``weight``."""
    rows = weight.float()
    rounding = rounding_of(type, rows.device)
    scales = Scales(type, rows, rounding)
    visit = _visit_by_kernel if fused(rows.device) else _visit
    codes, losses = visit(rows, factors.grouped, scales, rounding, factors, choose=True)
    if factors.free is not None:
        codes, losses = visit(rows, factors.free, scales, rounding, factors, choose=False)
    return RoundedRows(scales.blocks(codes).pack().blocks, losses)


def _falling(energy: Tensor) -> Tensor:
    """The indices that sort the last dimension by falling energy."""
    return torch.argsort(energy, dim=-1, descending=True, stable=True)


def _by_groups(energy: Tensor) -> Tensor:
    """The columns, (in,), with groups by falling energy and by falling energy within a group."""
    # Types with groups of 32 and of 16 columns share a factorization: groups of 16 are sorted
    # within groups of 32.
    columns = torch.arange(len(energy), device=energy.device).view(-1, 2, WIDEST_GROUP // 2)
    columns = columns.gather(2, _falling(energy[columns]))
    halves = _falling(energy[columns].sum(2))
    columns = columns.gather(1, halves[..., None].expand_as(columns))
    return columns[_falling(energy[columns].sum((1, 2)))].flatten()


def _energy(moment: Moment) -> Tensor:
    """The energy of each feature, (width,), on the device that computes with it."""
    energy = moment.diagonal()
    return energy if fused(energy.device) else energy.cpu()


def _factorize(
    moment: Moment, columns: Tensor, mean: Tensor, damping: float, threads: int
) -> tuple[OrderedFactor, Tensor]:
    """V for the order of ``columns``, and whether this damping was enough."""
    # With rows and columns in reverse order, the lower triangular factor, reversed too, is the
    # upper triangular one.
    reverse = columns.flip(0).to(moment.diagonal().device)
    damped = moment.matrix(reverse).to(columns.device).div_(mean)
    damped.diagonal().add_(damping)
    whole = cholesky_(damped, threads)
    return OrderedFactor(columns, damped.flip(0, 1)), whole


def _visit_by_kernel(
    weight: Tensor,
    order: OrderedFactor,
    scales: Scales,
    rounding: CodeRounding,
    factors: Factorization,
    *,
    choose: bool,
) -> tuple[Tensor, Tensor]:
    """``_visit`` where kernels compute."""
    drifted = None
    if factors.drift is not None:
        drifted = _drift_products(weight, order, factors.drift, factors.mean)
    return visit_panels(
        weight,
        order.columns,
        order.upper,
        scales,
        rounding,
        damping=factors.damping,
        drifted=drifted,
        size=scales.layout.group if choose else WIDEST_GROUP,
        choose=choose,
    )


def _visit(
    weight: Tensor,
    order: OrderedFactor,
    scales: Scales,
    rounding: CodeRounding,
    factors: Factorization,
    *,
    choose: bool,
) -> tuple[Tensor, Tensor]:
    """Visit all columns of ``weight`` (out, in) float32.

    choose: whether scales are chosen too; else ``scales`` holds them. Returns the rounded values,
    (in, out) int8 in the order in which they are stored, and the losses (out,).
    """
    layout, upper = LAYOUTS[scales.type], order.upper
    groups = order.columns // layout.group
    # While scales are chosen, the columns that are visited together must be of one group.
    width = layout.group if choose else WIDEST_GROUP
    # W in the order of visits, transposed to (in, out), so that a column is contiguous. Each column
    # that was visited is replaced by its column of D.
    work = weight.t()[order.columns].contiguous()
    codes = torch.empty_like(work, dtype=torch.int8)
    loss = torch.zeros_like(work[0])
    # Where inputs have drifted, D is W + C - Ŵ, so that C V is added to D V from the start.
    drifted = None
    if factors.drift is not None:
        drifted = _drift_products(weight, order, factors.drift, factors.mean)
    for first in range(0, len(work), _BLOCK):
        last = min(first + _BLOCK, len(work))
        # The sums Σ D_i V_ik over the columns of earlier blocks, by products of one fixed shape.
        carried = torch.zeros_like(work[first:last]) if drifted is None else drifted[first:last]
        for start in range(0, first, _BLOCK):
            earlier = slice(start, start + _BLOCK)
            carried.addmm_(upper[earlier, first:last].t(), work[earlier])
        for at in range(first, last, width):
            here = slice(at, at + width)
            sums = carried[at - first :][:width]
            if at > first:
                sums.addmm_(upper[first:at, here].t(), work[first:at])
            part = upper[here, here]
            inverse = torch.linalg.solve_triangular(part, _eye(part), upper=True)
            # What would make all of these columns of D V vanish, if none had to be rounded.
            targets = torch.addmm(work[here], inverse.t(), sums)
            members = groups[here][:1] if choose else groups[here]
            # For targets rather than the original weights: that is worth more than any other choice
            # made here (docs/quality.md). The squared pivot is the share of a column's error that
            # later columns can't compensate for.
            if choose:
                scales.choose(members, targets, part.diagonal().square())
            step, minimum = scales.step(members), scales.minimum(members)
            q = _codes(targets + minimum, step, inverse, rounding)
            if choose:
                scales.refit(members, q, targets, part)
                step, minimum = scales.step(members), scales.minimum(members)
            value = (q * step).sub_(minimum)
            loss += (part.t() @ targets.sub_(value)).square_().sum(0)
            codes[here] = q
            work[here] -= value
    # The squares are D H Dᵀ; the loss is D G Dᵀ. With drift D isn't known, since C isn't computed:
    # then λ stays counted.
    for start in range(0, len(work) if drifted is None else 0, _BLOCK):
        loss -= factors.damping * work[start : start + _BLOCK].square().sum(0)
    stored = torch.empty_like(codes)
    stored[order.columns] = codes
    return stored, loss


def _compact(drift: Tensor, device: torch.device) -> Tensor:
    """``drift`` on ``device``, in a dtype whose products are fast there."""
    drift = drift.to(device)
    return drift if multiplies_bfloat16(drift.device) else drift.float()


def _drift_products(weight: Tensor, order: OrderedFactor, drift: Tensor, mean: Tensor) -> Tensor:
    """C V, which drift adds to D V, (in, out) in the order of visits."""
    product = correction(weight, drift, order.columns).div_(mean).t()
    return torch.linalg.solve_triangular(order.upper, product, upper=True)


def _eye(like: Tensor) -> Tensor:
    """The unit matrix of the size, dtype and device of ``like``."""
    return torch.eye(len(like), dtype=like.dtype, device=like.device)


def _codes(targets: Tensor, step: Tensor, inverse: Tensor, rounding: CodeRounding) -> Tensor:
    """The rounded values (columns, out) of ``targets``, chosen one column after the other.

    targets: (columns, out) plus the minimum, overwritten; step: (columns, out) or (1, out);
    inverse: of V's part for these columns. Each error is added to the targets after it.
    """
    step = step.expand_as(targets)
    # A step of zero gives the value zero, whatever the code.
    reciprocal = torch.where(step == 0, 0, 1 / step)
    # By how much an error of column k moves the targets after it.
    share = inverse / inverse.diagonal()[:, None]
    q = torch.empty_like(targets)
    for k, (target, code) in enumerate(zip(targets, q, strict=True)):
        rounding(torch.mul(target, reciprocal[k], out=code))
        error = target.addcmul_(code, step[k], value=-1)
        targets[k + 1 :].addr_(share[k, k + 1 :], error, alpha=-1)
    return q
