"""The panel of columns that error feedback visits at a time, as one kernel on a CUDA device.

``feedback`` has the arithmetic. A program of the kernel visits all columns of the panel for a strip
of rows, whose errors stay in its registers; rows don't depend on each other. Sums are made in
another order than on the CPU, so that a target halfway between two codes may get the other one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

PANEL = 128  # columns at most
_STRIP = 32  # rows
_WARPS = 4


def visit_panel(
    columns: slice,
    work: Tensor,
    original: Tensor,
    unit: Tensor,
    pivots: Tensor,
    groups: Tensor,
    scales: Tensor,
    zeros: Tensor,
    levels: int,
    errors: Tensor,
    codes: Tensor,
    losses: Tensor,
) -> None:
    """Choose the codes of some columns of a weight, from the last to the first.

    columns: at most ``PANEL``; work: the targets, and original: the weight, (in, out) float32;
    unit, pivots: see ``feedback.Factor``; groups: of each column, (in,) int64; scales, zeros:
    (groups, out) float32; levels: the highest code. Writes the ``errors``, which are the weight
    minus its rounded values, (columns, out) float32, and the ``codes``, (in, out) uint8, and adds
    the squared residuals, times the pivots, to ``losses`` (out,). All are contiguous but ``unit``.
    """
    count, rows = errors.shape
    # So that what is needed at a column is contiguous.
    corner = unit[columns, columns].t().contiguous()
    _visit[(triton.cdiv(rows, _STRIP),)](
        work=work[columns],
        original=original[columns],
        corner=corner,
        pivots=pivots[columns],
        groups=groups[columns],
        scales=scales,
        zeros=zeros,
        errors=errors,
        codes=codes[columns],
        losses=losses,
        count=count,
        rows=rows,
        levels=levels,
        PANEL=max(16, triton.next_power_of_2(count)),
        STRIP=_STRIP,
        num_warps=_WARPS,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _visit(  # type: ignore[no-untyped-def]
    work,
    original,
    corner,
    pivots,
    groups,
    scales,
    zeros,
    errors,
    codes,
    losses,
    count,
    rows,
    levels,
    PANEL: tl.constexpr,
    STRIP: tl.constexpr,
):
    row = tl.program_id(0) * STRIP + tl.arange(0, STRIP)
    inside = row < rows
    place = tl.arange(0, PANEL)
    visited = tl.zeros((PANEL, STRIP), dtype=tl.float32)  # errors of the columns so far
    loss = tl.zeros((STRIP,), dtype=tl.float32)
    for step in range(count):
        column = count - 1 - step
        at = column * rows + row
        after = (place > column) & (place < count)
        factors = tl.load(corner + column * count + place, mask=after, other=0.0)
        target = tl.load(work + at, mask=inside, other=0.0)
        target += tl.sum(visited * factors[:, None], axis=0)
        group = tl.load(groups + column) * rows + row
        scale = tl.load(scales + group, mask=inside, other=1.0)
        zero = tl.load(zeros + group, mask=inside, other=0.0)
        # Limited before it is rounded: then adding and subtracting 1.5 · 2^23 rounds it, half to
        # even, as torch does.
        code = tl.minimum(tl.maximum(tl.div_rn(target, scale), -zero), levels - zero)
        code = (code + 12582912.0) - 12582912.0
        value = code * scale
        error = tl.load(original + at, mask=inside, other=0.0) - value
        residual = (target - value) * tl.load(pivots + column)
        loss += residual * residual
        tl.store(codes + at, (code + zero).to(tl.uint8), mask=inside)
        tl.store(errors + at, error, mask=inside)
        visited = tl.where(place[:, None] == column, error[None, :], visited)
    loss += tl.load(losses + row, mask=inside, other=0.0)
    tl.store(losses + row, loss, mask=inside)
