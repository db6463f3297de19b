"""The panel of columns that error feedback visits at a time, as one kernel on a CUDA device.

``feedback`` and ``scales`` have the arithmetic. A program of the kernel is one warp, which visits
all columns of the panel for a strip of rows, one group of columns after the other: a thread has all
columns of a group for one row in its registers. Rows don't depend on each other. Sums are made in
another order than on the CPU, so that a target halfway between two codes may get the other one.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from quantkit.methods.ggml.scales import LARGEST_HALF, SHARES, TINY, CodeRounding, Scales

_STRIP = 32  # rows
# Triton reads no other globals.
_FIRST_SHARE = tl.constexpr(SHARES[0])
_SHARE_STEP = tl.constexpr(SHARES[0] - SHARES[1])
_SHARES = tl.constexpr(len(SHARES))
_LARGEST_HALF = tl.constexpr(LARGEST_HALF)
_TINY = tl.constexpr(TINY)
# Added to a small float32 and subtracted again, it rounds half to even, as torch does.
_ROUNDER = tl.constexpr(1.5 * 2**23)


@dataclass(frozen=True)
class Triangles:
    """V's part for the columns of each group, all in the order of visits.

    upper: the parts themselves, (groups, columns, columns); sums: over the rows of each, (groups,
    columns); shares: by how much an error of one column of the group moves the target of each
    column after it, (groups, columns, columns). All are contiguous.
    """

    upper: Tensor
    sums: Tensor
    shares: Tensor

    @classmethod
    def of(cls, upper: Tensor, inverse: Tensor) -> Triangles:
        """From the parts and their inverses."""
        pivots = inverse.diagonal(dim1=1, dim2=2)[..., None]
        return cls(upper, upper.sum(1), (inverse / pivots).triu_(1).contiguous())


def visit_panel(
    columns: slice,
    *,
    targets: Tensor,
    work: Tensor,
    codes: Tensor,
    losses: Tensor,
    unit: Tensor,
    triangles: Triangles,
    groups: Tensor,
    scales: Scales,
    rounding: CodeRounding,
    damping: float,
    choose: bool,
) -> None:
    """Choose the codes of the groups in ``columns``, which are of the order of visits.

    targets: what all errors before the panel have made of the weight; work: the weight, which is
    replaced by its difference to the rounded values; codes: the rounded values, int8, which are
    written; all (in, out). losses: (out,), to which the losses are added; damping: what is taken
    from them for every squared difference; unit: (in, in), the share of a column's (second) error
    that is added to the targets of later columns (first); groups: of each column, (in,) int32;
    choose: whether ``scales`` are chosen too. All are contiguous.
    """
    width, rows = work.shape
    first, last, _ = columns.indices(width)
    size = triangles.upper.shape[1]
    layout = scales.layout
    # So that what is needed of an earlier column is contiguous.
    corner = unit[columns, columns].t().contiguous()
    _visit[(triton.cdiv(rows, _STRIP),)](
        targets=targets,
        work=work,
        codes=codes,
        losses=losses,
        corner=corner,
        upper=triangles.upper,
        upper_sums=triangles.sums,
        shares=triangles.shares,
        groups=groups,
        d=scales.d,
        scales=scales.scales,
        dmin=scales.dmin,
        mins=scales.mins,
        table=rounding.table if layout.table else losses,
        first=first,
        count=last - first,
        rows=rows,
        damping=float(damping),
        lowest=float(layout.codes[0]),
        highest=float(layout.codes[1]),
        scale_low=float(layout.scales[0]),
        scale_high=float(layout.scales[1]),
        min_high=float(layout.mins[1]),
        SIZE=size,
        STRIP=_STRIP,
        PER_BLOCK=layout.columns // layout.group,
        CHOOSE=choose,
        PLAIN=scales.plain,
        HAS_MIN=layout.has_min,
        TABLE=bool(layout.table),
        num_warps=_STRIP // 32,
        num_stages=1,
    )


# Without special cases of these integers, which would be compiled one by one; and without words of
# several numbers a thread, so that a thread has a row.
@triton.jit(do_not_specialize=["first", "count", "rows"])  # type: ignore[untyped-decorator]
def _visit(  # type: ignore[no-untyped-def]
    targets,
    work,
    codes,
    losses,
    corner,
    upper,
    upper_sums,
    shares,
    groups,
    d,
    scales,
    dmin,
    mins,
    table,
    first,
    count,
    rows,
    damping,
    lowest,
    highest,
    scale_low,
    scale_high,
    min_high,
    SIZE: tl.constexpr,
    STRIP: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    CHOOSE: tl.constexpr,
    PLAIN: tl.constexpr,
    HAS_MIN: tl.constexpr,
    TABLE: tl.constexpr,
):
    row = tl.program_id(0) * STRIP + tl.arange(0, STRIP)
    inside = row < rows
    place = tl.arange(0, SIZE)
    loss = tl.load(losses + row, mask=inside, other=0.0)
    for at in range(0, count, SIZE):
        column = first + at + place
        cells = column[:, None] * rows + row[None, :]
        within = (place >= 0)[:, None] & inside[None, :]
        target = tl.load(targets + cells, mask=within, other=0.0)
        for source in range(0, at, 4):
            for index in tl.static_range(4):
                earlier = source + index
                error = tl.load(work + (first + earlier) * rows + row, mask=inside, other=0.0)
                factor = tl.load(corner + earlier * count + at + place)
                target += factor[:, None] * error[None, :]
        triangle = (first + at) // SIZE * SIZE * SIZE
        pivot = tl.load(upper + triangle + place * (SIZE + 1))
        ones = tl.load(upper_sums + first + at + place)
        code = tl.zeros((SIZE, STRIP), dtype=tl.float32)
        if CHOOSE:
            group = tl.load(groups + first + at)
            in_group = group * rows + row
            in_block = group // PER_BLOCK * rows + row
            unit, min_unit = tl.full((STRIP,), 1.0, tl.float32), tl.full((STRIP,), 1.0, tl.float32)
            if not PLAIN:
                unit = tl.load(d + in_block, mask=inside, other=0.0)
                if HAS_MIN:
                    min_unit = tl.load(dmin + in_block, mask=inside, other=0.0)
            step, minimum = _chosen(
                target=target,
                importance=pivot * pivot,
                unit=unit,
                min_unit=min_unit,
                table=table,
                lowest=lowest,
                highest=highest,
                scale_low=scale_low,
                scale_high=scale_high,
                min_high=min_high,
                PLAIN=PLAIN,
                HAS_MIN=HAS_MIN,
                TABLE=TABLE,
            )
            reciprocal = _reciprocal(step)
            target += minimum[None, :]
            # V's part times the codes, for the fit.
            product = tl.zeros((SIZE, STRIP), dtype=tl.float32)
            for k in range(SIZE):
                here = (place == k)[:, None]
                one = tl.sum(tl.where(here, target, 0.0), axis=0)
                q = _rounded(one * reciprocal, table, lowest, highest, TABLE)
                line = triangle + k * SIZE + place
                target -= tl.load(shares + line)[:, None] * (one - q * step)[None, :]
                product += tl.load(upper + line)[:, None] * q[None, :]
                code = tl.where(here, q[None, :], code)
            # Columns of D V, and with them V's part times the targets.
            residual = (target - code * step[None, :]) * pivot[:, None]
            fitted = residual + product * step[None, :] - ones[:, None] * minimum[None, :]
            qq, tq = tl.sum(product * product, axis=0), tl.sum(product * fitted, axis=0)
            q1, t1 = tl.sum(product * ones[:, None], axis=0), tl.sum(fitted * ones[:, None], axis=0)
            n = tl.sum(ones * ones, axis=0)
            if not HAS_MIN:
                q1, t1 = q1 * 0.0, t1 * 0.0
            found, new_step, new_minimum = _held(
                qq=qq,
                tq=tq,
                q1=q1,
                t1=t1,
                n=n,
                unit=unit,
                min_unit=min_unit,
                scale_low=scale_low,
                scale_high=scale_high,
                min_high=min_high,
                PLAIN=PLAIN,
                HAS_MIN=HAS_MIN,
            )
            better = found < _cost(qq, tq, q1, t1, n, step, minimum)
            step = tl.where(better, new_step, step)
            minimum = tl.where(better, new_minimum, minimum)
            if PLAIN:
                tl.store(d + in_block, step, mask=inside)
                tl.store(dmin + in_block, minimum, mask=inside)
            else:
                held = _integers(step, unit, scale_low, scale_high)
                tl.store(scales + in_group, held, mask=inside)
                if HAS_MIN:
                    held = _integers(minimum, min_unit, 0.0, min_high)
                    tl.store(mins + in_group, held, mask=inside)
            residual = fitted - product * step[None, :] + ones[:, None] * minimum[None, :]
            value = code * step[None, :] - minimum[None, :]
        else:
            group = tl.load(groups + column)[:, None]
            in_group = group * rows + row[None, :]
            in_block = group // PER_BLOCK * rows + row[None, :]
            steps = tl.load(d + in_block, mask=within, other=0.0)
            if not PLAIN:
                steps *= tl.load(scales + in_group, mask=within, other=0.0)
            minima = tl.zeros((SIZE, STRIP), dtype=tl.float32)
            if HAS_MIN:
                minima = tl.load(dmin + in_block, mask=within, other=0.0)
                if not PLAIN:
                    minima *= tl.load(mins + in_group, mask=within, other=0.0)
            target += minima
            for k in range(SIZE):
                here = (place == k)[:, None]
                one = tl.sum(tl.where(here, target, 0.0), axis=0)
                step = tl.sum(tl.where(here, steps, 0.0), axis=0)
                q = _rounded(one * _reciprocal(step), table, lowest, highest, TABLE)
                share = tl.load(shares + triangle + k * SIZE + place)
                target -= share[:, None] * (one - q * step)[None, :]
                code = tl.where(here, q[None, :], code)
            residual = (target - code * steps) * pivot[:, None]
            value = code * steps - minima
        difference = tl.load(work + cells, mask=within, other=0.0) - value
        loss += tl.sum(residual * residual, axis=0)
        loss -= damping * tl.sum(tl.where(within, difference * difference, 0.0), axis=0)
        tl.store(codes + cells, code.to(tl.int8), mask=within)
        tl.store(work + cells, difference, mask=within)
        # The next group reads the differences, which other threads have written.
        tl.debug_barrier()
    tl.store(losses + row, loss, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _chosen(  # type: ignore[no-untyped-def]
    target,
    importance,
    unit,
    min_unit,
    table,
    lowest,
    highest,
    scale_low,
    scale_high,
    min_high,
    PLAIN: tl.constexpr,
    HAS_MIN: tl.constexpr,
    TABLE: tl.constexpr,
):
    """``Scales.choose``: the step and minimum of each row for its targets (columns, rows)."""
    high, low = tl.max(target, axis=0), tl.min(target, axis=0)
    if HAS_MIN:
        if not PLAIN:
            low = tl.minimum(low, 0.0)
        width, origin = (high - low) / highest, low
    else:
        width = tl.where(high > -low, high, low) / lowest
        origin = high * 0.0
    width = tl.where(tl.abs(width) < _TINY, _TINY, width)
    whole = tl.div_rn(target, width[None, :])
    offset = tl.div_rn(origin, width)
    weighted = target * importance[:, None]
    n, t1 = tl.sum(importance, axis=0), tl.sum(weighted, axis=0)
    if not HAS_MIN:
        t1 = t1 * 0.0
    best = high * 0.0 + float("inf")
    step, minimum = high * 0.0, high * 0.0
    for index in range(_SHARES):
        wider = 1.0 / (_FIRST_SHARE - _SHARE_STEP * index)
        q = _rounded(whole * wider - offset[None, :], table, lowest, highest, TABLE)
        tq = tl.sum(weighted * q, axis=0)
        spread = q * importance[:, None]
        q1, qq = tl.sum(spread, axis=0), tl.sum(spread * q, axis=0)
        if not HAS_MIN:
            q1 = q1 * 0.0
        cost, new_step, new_minimum = _held(
            qq=qq,
            tq=tq,
            q1=q1,
            t1=t1,
            n=n,
            unit=unit,
            min_unit=min_unit,
            scale_low=scale_low,
            scale_high=scale_high,
            min_high=min_high,
            PLAIN=PLAIN,
            HAS_MIN=HAS_MIN,
        )
        better = cost < best
        best = tl.where(better, cost, best)
        step = tl.where(better, new_step, step)
        minimum = tl.where(better, new_minimum, minimum)
    return step, minimum


@triton.jit  # type: ignore[untyped-decorator]
def _held(  # type: ignore[no-untyped-def]
    qq,
    tq,
    q1,
    t1,
    n,
    unit,
    min_unit,
    scale_low,
    scale_high,
    min_high,
    PLAIN: tl.constexpr,
    HAS_MIN: tl.constexpr,
):
    """The cost, step and minimum of the best fit that the block can hold."""
    whole = qq * n
    determinant = tl.maximum(tl.maximum(whole - q1 * q1, whole * 1e-6), _TINY)
    step = tl.div_rn(tq * n - q1 * t1, determinant)
    minimum = step * 0.0
    if PLAIN:
        step = _half(step)
        if HAS_MIN:
            minimum = _half((step * q1 - t1) / n)
    else:
        if HAS_MIN:
            alone = tl.div_rn(tq, tl.maximum(qq, _TINY))
            step = tl.where(step * q1 < t1, alone, step)
        step = _integers(step, unit, scale_low, scale_high) * unit
        if HAS_MIN:
            minimum = _integers((step * q1 - t1) / n, min_unit, 0.0, min_high) * min_unit
    return _cost(qq, tq, q1, t1, n, step, minimum), step, minimum


@triton.jit
def _cost(qq, tq, q1, t1, n, step, minimum):  # type: ignore[no-untyped-def]
    """``_LeastSquares.loss``."""
    linear = tq + minimum * q1
    return step * (step * qq - 2.0 * linear) + minimum * (minimum * n + 2.0 * t1)


@triton.jit  # type: ignore[untyped-decorator]
def _rounded(x, table, lowest, highest, TABLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """``CodeRounding``: the nearest value that a code can have."""
    if TABLE:
        halves = tl.floor(tl.minimum(tl.maximum(x * 2.0, -256.0), 255.0))
        code = tl.load(table + (halves.to(tl.int32) + 256))
    else:
        code = (tl.minimum(tl.maximum(x, lowest), highest) + _ROUNDER) - _ROUNDER
    return code


@triton.jit
def _integers(value, unit, low, high):  # type: ignore[no-untyped-def]
    whole = tl.div_rn(value, tl.maximum(unit, _TINY))
    return (tl.minimum(tl.maximum(whole, low), high) + _ROUNDER) - _ROUNDER


@triton.jit
def _half(value):  # type: ignore[no-untyped-def]
    limited = tl.minimum(tl.maximum(value, -_LARGEST_HALF), _LARGEST_HALF)
    return limited.to(tl.float16).to(tl.float32)


@triton.jit
def _reciprocal(step):  # type: ignore[no-untyped-def]
    """Zero for a step of zero, which gives the value zero whatever the code."""
    return tl.where(step == 0.0, 0.0, tl.div_rn(step * 0.0 + 1.0, tl.where(step == 0.0, 1.0, step)))
