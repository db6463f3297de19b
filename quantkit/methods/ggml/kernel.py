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

from quantkit.methods.ggml.kernel_scales import (
    chosen_scales,
    fit_cost,
    held_fit,
    integers,
    reciprocal,
    rounded,
)
from quantkit.methods.ggml.scales import CodeRounding, Scales

_STRIP = 32  # rows


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
            step, minimum = chosen_scales(
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
            inverse = reciprocal(step)
            target += minimum[None, :]
            # V's part times the codes, for the fit.
            product = tl.zeros((SIZE, STRIP), dtype=tl.float32)
            for k in range(SIZE):
                here = (place == k)[:, None]
                one = tl.sum(tl.where(here, target, 0.0), axis=0)
                q = rounded(one * inverse, table, lowest, highest, TABLE)
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
            found, new_step, new_minimum = held_fit(
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
            better = found < fit_cost(qq, tq, q1, t1, n, step, minimum)
            step = tl.where(better, new_step, step)
            minimum = tl.where(better, new_minimum, minimum)
            if PLAIN:
                tl.store(d + in_block, step, mask=inside)
                tl.store(dmin + in_block, minimum, mask=inside)
            else:
                integer = integers(step, unit, scale_low, scale_high)
                tl.store(scales + in_group, integer, mask=inside)
                if HAS_MIN:
                    integer = integers(minimum, min_unit, 0.0, min_high)
                    tl.store(mins + in_group, integer, mask=inside)
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
                q = rounded(one * reciprocal(step), table, lowest, highest, TABLE)
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
