"""What ``scales`` has, as functions of Triton's: a group's step and minimum, and rounded codes.

Tensors are of a strip of rows, (columns, rows) or (rows,). unit, min_unit: ``d`` and ``dmin`` of
the group's block; lowest, highest: codes; scale_low, scale_high, min_high: the limits of a group's
integers; PLAIN, HAS_MIN, TABLE: whether the type is plain, has minima, and a table of values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit.methods.ggml.scales import LARGEST_HALF, SHARES, TINY

# Triton reads no other globals.
_FIRST_SHARE = tl.constexpr(SHARES[0])
_SHARE_STEP = tl.constexpr(SHARES[0] - SHARES[1])
_SHARES = tl.constexpr(len(SHARES))
_LARGEST_HALF = tl.constexpr(LARGEST_HALF)
_TINY = tl.constexpr(TINY)
# Added to a small float32 and subtracted again, it rounds half to even, as torch does.
_ROUNDER = tl.constexpr(1.5 * 2**23)


@triton.jit  # type: ignore[untyped-decorator]
def chosen_scales(  # type: ignore[no-untyped-def]
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
        q = rounded(whole * wider - offset[None, :], table, lowest, highest, TABLE)
        tq = tl.sum(weighted * q, axis=0)
        spread = q * importance[:, None]
        q1, qq = tl.sum(spread, axis=0), tl.sum(spread * q, axis=0)
        if not HAS_MIN:
            q1 = q1 * 0.0
        cost, new_step, new_minimum = held_fit(
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
def held_fit(  # type: ignore[no-untyped-def]
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
        step = integers(step, unit, scale_low, scale_high) * unit
        if HAS_MIN:
            minimum = integers((step * q1 - t1) / n, min_unit, 0.0, min_high) * min_unit
    return fit_cost(qq, tq, q1, t1, n, step, minimum), step, minimum


@triton.jit
def fit_cost(qq, tq, q1, t1, n, step, minimum):  # type: ignore[no-untyped-def]
    """``_LeastSquares.loss``."""
    linear = tq + minimum * q1
    return step * (step * qq - 2.0 * linear) + minimum * (minimum * n + 2.0 * t1)


@triton.jit  # type: ignore[untyped-decorator]
def rounded(x, table, lowest, highest, TABLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """``CodeRounding``: the nearest value that a code can have."""
    if TABLE:
        halves = tl.floor(tl.minimum(tl.maximum(x * 2.0, -256.0), 255.0))
        code = tl.load(table + (halves.to(tl.int32) + 256))
    else:
        code = (tl.minimum(tl.maximum(x, lowest), highest) + _ROUNDER) - _ROUNDER
    return code


@triton.jit
def integers(value, unit, low, high):  # type: ignore[no-untyped-def]
    whole = tl.div_rn(value, tl.maximum(unit, _TINY))
    return (tl.minimum(tl.maximum(whole, low), high) + _ROUNDER) - _ROUNDER


@triton.jit
def _half(value):  # type: ignore[no-untyped-def]
    limited = tl.minimum(tl.maximum(value, -_LARGEST_HALF), _LARGEST_HALF)
    return limited.to(tl.float16).to(tl.float32)


@triton.jit
def reciprocal(step):  # type: ignore[no-untyped-def]
    """Zero for a step of zero, which gives the value zero whatever the code."""
    return tl.where(step == 0.0, 0.0, tl.div_rn(step * 0.0 + 1.0, tl.where(step == 0.0, 1.0, step)))
