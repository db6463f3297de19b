"""GPTQ's error feedback on ggml's own grids: the same bytes as llama.cpp's, better chosen.

Let H = XᵀX + λI over the calibration tokens, and H = V Vᵀ with V upper triangular. The loss of a
difference D = W - Ŵ is ‖D V‖², and column k of D V is V_kk D_k + Σ_{i<k} D_i V_ik. So columns are
visited one after the other, and each is rounded from the value that would make its column of
D V vanish: GPTQ (Frantar et al., arXiv 2210.17323), seen as Babai's nearest plane (Chen et al.,
arXiv 2507.18553), with one factorization and no inverse of H.

The units (d, dmin) of a block are fixed first. The integers of a group are chosen when the group
is reached, for what earlier errors have made of its weights; then its columns are visited, and
the integers are fitted to the codes once more. The order of visits needs no room in the file:
groups by falling energy, and so the columns of a group. Where few inputs carry most of the energy
(as before down projections) a second round follows, with the scales of the first, through the
columns of all groups by falling energy.

Where inputs have drifted, each column's target is moved besides (``drift``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantkit.base.errors import InputError
from quantkit.base.parallel import multiplies_bfloat16
from quantkit.methods.cholesky import cholesky_
from quantkit.methods.drift import correction
from quantkit.methods.ggml.blocks import LAYOUTS
from quantkit.methods.ggml.scales import Rounding, Scales
from quantkit.methods.ggml.types import GgmlTensor, row_bytes
from quantkit.methods.grids import sum_of

if TYPE_CHECKING:
    from quantkit.calibration.statistics import Moment

TYPES = tuple(LAYOUTS)
WIDTH = 32  # columns visited together; groups are as wide, or half. Inputs are a multiple
_BLOCK = 256  # columns between matrix products with all that were visited before
_ROWS = 4096  # done together: no row depends on another, and so memory is bounded
_RETRIES = 4  # dampings tried, each ten times the one before
_HEAVY_TAIL = 0.6  # median energy over mean, below which the second round pays


@dataclass(frozen=True)
class Order:
    """columns: those of the weight in the order of visits; upper: V (in, in) in that order."""

    columns: Tensor
    upper: Tensor


@dataclass(frozen=True)
class Factor:
    """A factorized Gram matrix, for all weights that read the same input, of any type.

    grouped: columns of a group stay together; free: by falling energy alone, None where that
    wouldn't pay. H was divided by ``mean``, the mean diagonal; λ is ``damping`` times it. drift:
    (X - Y)ᵀ Y as it was summed, None where inputs haven't drifted.
    """

    grouped: Order
    free: Order | None
    mean: float
    damping: float
    drift: Tensor | None = None


@dataclass(frozen=True)
class Outcome:
    """The quantized weight, and its Gram loss tr(D G Dᵀ), D = W - Ŵ."""

    tensor: GgmlTensor
    loss: float


def factorize(
    moment: Moment, damping: float = 0.01, drift: Tensor | None = None, threads: int = 1
) -> Factor | None:
    """Factorize XᵀX (in, in), ``in`` a multiple of 32, on the CPU.

    drift: (X - Y)ᵀ Y (in, in), where the moment is of Y and was to be of X; losses are then those
    of the corrected weights, and count λ too.
    None when no damping, up to a thousand times ``damping``, makes it positive definite: where
    it holds NaN or infinity, or where calibration never excited the input.
    Raises InputError for another width.
    """
    energy = moment.diagonal().cpu()
    if len(energy) % WIDTH:
        raise InputError(f"a Gram matrix of {len(energy)} inputs doesn't fit groups of {WIDTH}")
    mean = float(energy.mean())
    if not 0 < mean < float("inf"):
        return None
    for attempt in range(_RETRIES):
        share = damping * 10**attempt
        grouped = _factorize(moment, _by_groups(energy), mean, share, threads)
        if grouped is None:
            continue
        heavy = bool(energy.median() < _HEAVY_TAIL * mean)
        free = _factorize(moment, _falling(energy), mean, share, threads) if heavy else None
        return Factor(grouped, free, mean, share, None if drift is None else _compact(drift))
    return None


def quantize(weight: Tensor, factor: Factor, type: str) -> Outcome:
    """Quantize ``weight`` (out, in; any float dtype) to one of ``TYPES``.

    Raises InputError for another type, for rows that its blocks don't divide, for a factor of
    another width and for NaN or infinite values.
    """
    if type not in TYPES:
        raise InputError(
            f"{type} gets no error feedback", fix=f"Types that do: {', '.join(TYPES)}."
        )
    row_bytes(type, weight.shape[-1])
    if weight.ndim != 2 or weight.shape[1] != len(factor.grouped.columns):
        raise InputError(
            f"weight {tuple(weight.shape)} for {len(factor.grouped.columns)} measured inputs"
        )
    if not bool(weight.isfinite().all()):
        raise InputError("the weight holds NaN or infinite values")
    rounding = Rounding(type, weight.device)
    parts = [_quantize_rows(rows.float(), factor, type, rounding) for rows in weight.split(_ROWS)]
    blocks = torch.cat([part.tensor.blocks for part in parts])
    loss = math.fsum(part.loss for part in parts)
    return Outcome(GgmlTensor(type, blocks, tuple(weight.shape)), loss)


def _quantize_rows(rows: Tensor, factor: Factor, type: str, rounding: Rounding) -> Outcome:
    scales = Scales(type, rows, rounding)
    codes, loss = _visit(rows, factor.grouped, scales, rounding, factor, choose=True)
    if factor.free is not None:
        codes, loss = _visit(rows, factor.free, scales, rounding, factor, choose=False)
    return Outcome(scales.blocks(codes).pack(), loss)


def _falling(energy: Tensor) -> Tensor:
    return torch.argsort(energy, dim=-1, descending=True, stable=True)


def _by_groups(energy: Tensor) -> Tensor:
    """Groups of 32 by falling energy; within them groups of 16; within these, columns."""
    columns = torch.arange(len(energy), device=energy.device).view(-1, 2, WIDTH // 2)
    columns = columns.gather(2, _falling(energy[columns]))
    halves = _falling(energy[columns].sum(2))
    columns = columns.gather(1, halves[..., None].expand_as(columns))
    return columns[_falling(energy[columns].sum((1, 2)))].flatten()


def _factorize(
    moment: Moment, columns: Tensor, mean: float, damping: float, threads: int
) -> Order | None:
    # The Cholesky factor of the matrix turned end for end, turned back, is upper triangular.
    turned = columns.flip(0).to(moment.diagonal().device)
    damped = moment.matrix(turned).cpu().div_(mean)
    damped.diagonal().add_(damping)
    return Order(columns, damped.flip(0, 1)) if cholesky_(damped, threads) else None


def _visit(
    weight: Tensor,
    order: Order,
    scales: Scales,
    rounding: Rounding,
    factor: Factor,
    *,
    choose: bool,
) -> tuple[Tensor, float]:
    """Visit all columns; ``choose``: scales too, or keep those there are.

    Returns the rounded values (in, out) int8 in stored order, and the Gram loss.
    """
    layout, upper = LAYOUTS[scales.type], order.upper
    groups = order.columns // layout.group
    width = layout.group if choose else WIDTH
    # W in the order of visits, (in, out), so that a column is contiguous. D takes its place.
    work = weight.t()[order.columns].contiguous()
    codes = torch.empty_like(work, dtype=torch.int8)
    loss = torch.zeros_like(work[0])
    moved = None if factor.drift is None else _moved(weight, order, factor.drift, factor.mean)
    for first in range(0, len(work), _BLOCK):
        last = min(first + _BLOCK, len(work))
        # What the columns before have put into these of D V, by products of one fixed shape.
        carried = torch.zeros_like(work[first:last]) if moved is None else moved[first:last]
        for start in range(0, first, _BLOCK):
            done = slice(start, start + _BLOCK)
            carried.addmm_(upper[done, first:last].t(), work[done])
        for at in range(first, last, width):
            here = slice(at, at + width)
            due = carried[at - first :][:width]
            if at > first:
                due.addmm_(upper[first:at, here].t(), work[first:at])
            part = upper[here, here]
            inverse = torch.linalg.solve_triangular(part, _eye(part), upper=True)
            targets = torch.addmm(work[here], inverse.t(), due)
            members = groups[here][:1] if choose else groups[here]
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
    for start in range(0, len(work) if moved is None else 0, _BLOCK):
        loss -= factor.damping * work[start : start + _BLOCK].square().sum(0)
    stored = torch.empty_like(codes)
    stored[order.columns] = codes
    return stored, sum_of(loss) * factor.mean


def _compact(drift: Tensor) -> Tensor:
    """On the CPU, in a dtype whose products are fast there."""
    drift = drift.cpu()
    return drift if multiplies_bfloat16(drift.device) else drift.float()


def _moved(weight: Tensor, order: Order, drift: Tensor, mean: float) -> Tensor:
    """What drift puts into the columns of D V, in their order, (in, out)."""
    wanted = correction(weight, drift, order.columns).div_(mean).t()
    return torch.linalg.solve_triangular(order.upper, wanted, upper=True)


def _eye(like: Tensor) -> Tensor:
    return torch.eye(len(like), dtype=like.dtype, device=like.device)


def _codes(targets: Tensor, step: Tensor, inverse: Tensor, rounding: Rounding) -> Tensor:
    """Round ``targets`` (columns, out) in turn, each error carried on to the columns after it.

    step: (columns, out) or (1, out); inverse: of these columns' part of V. Spends ``targets``.
    """
    step = step.expand_as(targets)
    reciprocal = torch.where(step == 0, 0, 1 / step)
    share = inverse / inverse.diagonal()[:, None]
    q = torch.empty_like(targets)
    for k, (target, code) in enumerate(zip(targets, q, strict=True)):
        rounding(torch.mul(target, reciprocal[k], out=code))
        error = target.addcmul_(code, step[k], value=-1)
        targets[k + 1 :].addr_(share[k, k + 1 :], error, alpha=-1)
    return q
