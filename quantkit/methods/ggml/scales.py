"""The scales of ggml's scalar types, chosen group by group, and rounding to their codes.

``blocks`` has the formula of a weight. A group's ``d · scale`` is called its *step* here, and its
``dmin · min`` its *minimum*; ``d`` and ``dmin`` are the *units* of a block. Matrices are
transposed, (…, out), so that the columns of a weight are contiguous.

llama.cpp picks a group's scale among some candidates by a weighted sum of squares
(``make_qkx3_quants`` and its like in ``ggml-quants.c``). So does ``Scales.choose``, but the steps
and minima that it compares are those that the block can hold.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.methods.ggml.blocks import LAYOUTS, Blocks

# Shares of a group's range that are tried as the range of its codes.
SHARES = tuple(1.08 - 0.03 * step for step in range(12))
# The units are fixed before error feedback adds to the weights. A step that ``d`` is too small for
# would clip them, and a ``d`` that is larger than needed costs next to nothing: so units have room
# for steps larger by this factor.
_HEADROOM = 1.15
LARGEST_HALF = 65504.0
TINY = 1e-30


class CodeRounding:
    """Rounds to the nearest value that a code of ``type`` can have."""

    def __init__(self, type: str, device: torch.device) -> None:
        layout = LAYOUTS[type]
        self._lowest, self._highest = layout.codes
        self.table: Tensor | None = None  # the value of every half step from -128 on
        if layout.table:
            # The borders between neighbors are multiples of a half, so that the nearest value of
            # every half step, from -128 to 127.5, is an exact table of all roundings.
            values = torch.tensor(layout.table, dtype=torch.float32)
            middles = torch.arange(-256, 256) / 2 + 0.25
            nearest = (middles[:, None] - values).abs().argmin(1)
            self.table = values[nearest].to(device)
            self._indices = nearest[::2].to(torch.int8).to(device)  # for integers from -128 on

    def __call__(self, x: Tensor) -> Tensor:
        """Round ``x``, float32 in units of the step, in place."""
        if self.table is None:
            return x.round_().clamp_(self._lowest, self._highest)
        places = x.mul_(2).floor_().clamp_(-256, 255).add_(256).to(torch.int32)
        return x.copy_(self.table.index_select(0, places.flatten()).view(x.shape))

    def stored(self, values: Tensor) -> Tensor:
        """The codes stored for rounded values (int8): themselves, or their indices in the table."""
        return values if self.table is None else self._indices[values.long() + 128]


@functools.cache
def rounding_of(type: str, device: torch.device) -> CodeRounding:
    """The rounding of ``type``: its tables are copied to a device once."""
    return CodeRounding(type, device)


@dataclass(frozen=True)
class _LeastSquares:
    """The weighted sums of a group, from which step and minimum follow by least squares.

    For codes q and targets t: qq, tq: the sums of q² and t · q; q1, t1: of q and t; n: of ones. All
    are (…, out) but n, a scalar.
    """

    qq: Tensor
    tq: Tensor
    q1: Tensor
    t1: Tensor
    n: Tensor

    def loss(self, step: Tensor, minimum: Tensor) -> Tensor:
        """The squared error Σ (step · q - minimum - t)², less the sum of t²."""
        linear = self.tq + minimum * self.q1
        return step * (step * self.qq - 2 * linear) + minimum * (minimum * self.n + 2 * self.t1)

    def best_step(self, *, positive: bool) -> Tensor:
        """The step of the lowest loss; ``positive``: the type has no minimum below zero."""
        # Where all codes are alike, any step would do: the floor keeps it finite.
        whole = self.qq * self.n
        determinant = torch.maximum(whole - self.q1.square(), whole * 1e-6).clamp_(min=TINY)
        step = (self.tq * self.n - self.q1 * self.t1) / determinant
        if not positive:
            return step
        alone = self.tq / self.qq.clamp(min=TINY)
        return torch.where(self.best_minimum(step) < 0, alone, step)

    def best_minimum(self, step: Tensor) -> Tensor:
        """The minimum of the lowest loss with this step."""
        return (step * self.q1 - self.t1) / self.n


class Scales:
    """The units and scales of one matrix, which are chosen group by group.

    d, dmin: (blocks, out) float32, exact in fp16; scales, mins: (groups, out) float32; plain:
    whether a block is one group, whose ``d`` and ``dmin`` are chosen.
    """

    def __init__(self, type: str, weight: Tensor, rounding: CodeRounding) -> None:
        """Fix the units of all blocks, from ``weight`` (out, in) float32."""
        self.type = type
        self.layout = layout = LAYOUTS[type]
        self._rounding = rounding
        self.plain = layout.group == layout.columns
        groups = weight.unflatten(1, (-1, layout.group))
        high, low = groups.amax(2).t().contiguous(), groups.amin(2).t().contiguous()
        step, origin = self._range(high, low)
        per_block = layout.columns // layout.group
        self.d = self._unit(step.abs(), layout.scales, per_block)
        self.dmin = self._unit(-origin, layout.mins, per_block)
        # For plain types they stay ones: ``d`` and ``dmin`` are chosen instead.
        self.scales, self.mins = torch.ones_like(step), torch.ones_like(step)

    def _range(self, high: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        """The step with which codes cover [low, high], and the weight of code 0; all (…, out)."""
        lowest, highest = self.layout.codes
        if not self.layout.has_min:
            # The lowest code reaches at least as far from zero as the highest: it is for the larger
            # extreme, whatever the sign of that, by a step that may be negative.
            extreme = torch.where(high > -low, high, low)
            return extreme / lowest, torch.zeros_like(extreme)
        if not self.plain:  # the integer ``min`` is never negative
            low = low.clamp(max=0)
        return (high - low) / highest, low

    def _unit(self, largest: Tensor, limits: tuple[int, int], per_block: int) -> Tensor:
        """The unit (blocks, out) of which the highest integer gives ``largest`` (groups, out)."""
        largest = largest.unflatten(0, (-1, per_block)).amax(1)
        return _half(largest * (_HEADROOM / max(limits[1], 1)))

    def step(self, groups: Tensor) -> Tensor:
        """``d · scale`` of the groups of these numbers (n,): (n, out)."""
        return self.d[self._blocks(groups)] * self.scales[groups]

    def minimum(self, groups: Tensor) -> Tensor:
        """``dmin · min`` of the groups of these numbers (n,): (n, out)."""
        return self.dmin[self._blocks(groups)] * self.mins[groups]

    def _blocks(self, groups: Tensor) -> Tensor:
        return groups * self.layout.group // self.layout.columns

    def choose(self, group: Tensor, targets: Tensor, importance: Tensor) -> None:
        """Choose the step and minimum of one group for its targets.

        group: its number, (1,); targets: (columns, out) float32; importance: the weights of the
        columns' squared errors, (columns,).
        """
        # Several steps around the one that covers the range give codes; each set of codes has its
        # own best step and minimum, and the best of these that the block can hold wins.
        step, origin = self._range(targets.amax(0), targets.amin(0))
        step = torch.where(step.abs() < TINY, TINY, step)
        shares = torch.tensor(SHARES, device=targets.device)[:, None, None]
        scaled = targets / step / shares  # (shares, columns, out)
        q = self._rounding(scaled.sub_(origin / step))
        weighted = targets * importance[:, None]
        tq = weighted.mul(q).sum(1)
        q1 = importance @ q
        qq = importance @ q.square_()
        sums = self._sums(qq, tq, q1, weighted.sum(0), importance.sum())
        losses, *choices = self._held(group, sums)
        best = losses.min(0, keepdim=True).indices
        self._set(group, *(choice.gather(0, best)[0] for choice in choices))

    def refit(self, group: Tensor, codes: Tensor, targets: Tensor, upper: Tensor) -> None:
        """Fit the step and minimum of one group again, to the codes that were chosen.

        group: its number, (1,); codes: the rounded values, (columns, out); targets: T (columns,
        out); upper: V (columns, columns). The error is ‖(Ŵ - T) V‖².
        """
        q, t, ones = upper.t() @ codes, upper.t() @ targets, upper.sum(0)
        sums = self._sums(
            q.square().sum(0), (q * t).sum(0), ones @ q, ones @ t, ones.square().sum()
        )
        loss, step, minimum = self._held(group, sums)
        old_step, old_minimum = self.step(group)[0], self.minimum(group)[0]
        # Rounding to what the block can hold may cost more than the fit gains.
        better = loss < sums.loss(old_step, old_minimum)
        self._set(
            group,
            torch.where(better, step, old_step),
            torch.where(better, minimum, old_minimum),
        )

    def _sums(self, qq: Tensor, tq: Tensor, q1: Tensor, t1: Tensor, n: Tensor) -> _LeastSquares:
        if not self.layout.has_min:  # so that the best minimum is zero
            q1, t1 = torch.zeros_like(q1), torch.zeros_like(t1)
        return _LeastSquares(qq, tq, q1, t1, n)

    def _held(self, group: Tensor, sums: _LeastSquares) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, step and minimum of the best fit that the block can hold; all (…, out)."""
        block = self._blocks(group)
        step = sums.best_step(positive=not self.plain)
        step = self._snap(step, self.d[block][0], self.layout.scales)
        # The minimum is fitted to the step as it is rounded.
        minimum = self._snap(sums.best_minimum(step), self.dmin[block][0], self.layout.mins)
        return sums.loss(step, minimum), step, minimum

    def _snap(self, value: Tensor, unit: Tensor, limits: tuple[int, int]) -> Tensor:
        """The nearest value that can be stored: an fp16, or an integer times the unit."""
        return _half(value) if self.plain else _integers(value, unit, limits).mul_(unit)

    def _set(self, group: Tensor, step: Tensor, minimum: Tensor) -> None:
        if self.plain:  # a block is a group
            self.d[group], self.dmin[group] = step, minimum
            return
        block = self._blocks(group)
        self.scales[group] = _integers(step, self.d[block][0], self.layout.scales)
        self.mins[group] = _integers(minimum, self.dmin[block][0], self.layout.mins)

    def blocks(self, codes: Tensor) -> Blocks:
        """The blocks of the matrix whose rounded values are ``codes``, (in, out) int8."""
        return Blocks(
            type=self.type,
            codes=self._rounding.stored(codes).t(),
            d=self.d.t(),
            scales=self.scales.t(),
            dmin=self.dmin.t(),
            mins=self.mins.t(),
        )


def _half(value: Tensor) -> Tensor:
    """``value`` rounded to a finite fp16, as float32."""
    return value.clamp(-LARGEST_HALF, LARGEST_HALF).to(torch.float16).float()


def _integers(value: Tensor, unit: Tensor, limits: tuple[int, int]) -> Tensor:
    """``value`` in units, rounded to integers between the limits, as float32."""
    return (value / unit.clamp(min=TINY)).round_().clamp_(*limits)
