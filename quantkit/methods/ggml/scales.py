"""The scales of ggml's scalar types, chosen group by group, and the rounding between them.

``ggml_blocks`` says what they are. Here matrices are transposed, (…, out), so that the columns
of a weight are contiguous, and a group's ``d · scale`` and ``dmin · min`` are called its *step*
and its *minimum*.

llama.cpp picks a group's scale among some candidates by a weighted sum of squares
(``make_qkx3_quants`` and its kin in ``ggml-quants.c``). So does ``choose``, but what it compares
are steps and minima that the block can hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.methods.ggml.blocks import LAYOUTS, Blocks

# Shares of a group's range that are tried as the range of its codes.
_SHARES = tuple(1.08 - 0.03 * step for step in range(12))
# How far a group's step may outgrow all of its block's before it is chosen. The feedback adds
# to weights, and a step that d can't reach clips them; a d too large costs next to nothing.
_HEADROOM = 1.15
_LARGEST_HALF = 65504.0
_TINY = 1e-30


class Rounding:
    """To the nearest value that a code of ``type`` can have."""

    def __init__(self, type: str, device: torch.device) -> None:
        layout = LAYOUTS[type]
        self._lowest, self._highest = layout.codes
        self._table: Tensor | None = None
        if layout.table:
            # The borders between neighbours are multiples of a half: a table of half steps,
            # from -128 to 127.5, is exact.
            values = torch.tensor(layout.table, dtype=torch.float32)
            middles = torch.arange(-256, 256) / 2 + 0.25
            nearest = (middles[:, None] - values).abs().argmin(1)
            self._table = values[nearest].to(device)
            self._indices = nearest[::2].to(torch.int8).to(device)  # of the integers from -128

    def __call__(self, x: Tensor) -> Tensor:
        """Round ``x`` (float32, in codes' units) in place."""
        if self._table is None:
            return x.round_().clamp_(self._lowest, self._highest)
        places = x.mul_(2).floor_().clamp_(-256, 255).add_(256).to(torch.int32)
        return x.copy_(self._table.index_select(0, places.flatten()).view(x.shape))

    def stored(self, values: Tensor) -> Tensor:
        """Rounded values (int8) as the codes that are stored: themselves, or their indices."""
        return values if self._table is None else self._indices[values.long() + 128]


@dataclass(frozen=True)
class _Fit:
    """Sums, (…, out), that give the squared error Σ (step · q - minimum - t)² less Σ t².

    qq, tq: of q² and t · q; q1, t1: of q and t; n: of ones, a number. All weighted alike.
    """

    qq: Tensor
    tq: Tensor
    q1: Tensor
    t1: Tensor
    n: Tensor

    def loss(self, step: Tensor, minimum: Tensor) -> Tensor:
        linear = self.tq + minimum * self.q1
        return step * (step * self.qq - 2 * linear) + minimum * (minimum * self.n + 2 * self.t1)

    def best_step(self, *, positive: bool) -> Tensor:
        """The step of the least squares; ``positive``: minima below zero don't exist."""
        # Codes that are all alike leave the step open; the floor keeps it from running off.
        whole = self.qq * self.n
        determinant = torch.maximum(whole - self.q1.square(), whole * 1e-6).clamp_(min=_TINY)
        step = (self.tq * self.n - self.q1 * self.t1) / determinant
        if not positive:
            return step
        alone = self.tq / self.qq.clamp(min=_TINY)
        return torch.where(self.best_minimum(step) < 0, alone, step)

    def best_minimum(self, step: Tensor) -> Tensor:
        return (step * self.q1 - self.t1) / self.n


class Scales:
    """Scales and units of one matrix, to be chosen group by group.

    d, dmin: float32 (blocks, out), exact in fp16; scales, mins: float32 (groups, out).
    """

    def __init__(self, type: str, weight: Tensor, rounding: Rounding) -> None:
        """Fix the units of the blocks of ``weight`` (out, in) float32."""
        self.type = type
        self._layout = layout = LAYOUTS[type]
        self._rounding = rounding
        self._plain = layout.group == layout.columns
        groups = weight.unflatten(1, (-1, layout.group))
        step, origin = self._range(groups.amax(2).t(), groups.amin(2).t())
        per_block = layout.columns // layout.group
        self.d = self._unit(step.abs(), layout.scales, per_block)
        self.dmin = self._unit(-origin, layout.mins, per_block)
        self.scales, self.mins = torch.ones_like(step), torch.ones_like(step)
        self._shares = torch.tensor(_SHARES, device=weight.device)[:, None, None]

    def _range(self, high: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        """Step and value of code 0 with which the codes cover [low, high]."""
        lowest, highest = self._layout.codes
        if not self._layout.has_min:
            extreme = torch.where(high > -low, high, low)
            return extreme / lowest, torch.zeros_like(extreme)
        if not self._plain:  # minima can't be negative
            low = low.clamp(max=0)
        return (high - low) / highest, low

    def _unit(self, largest: Tensor, limits: tuple[int, int], per_block: int) -> Tensor:
        """The unit in which integers up to ``limits`` reach ``largest`` (groups, out)."""
        largest = largest.unflatten(0, (-1, per_block)).amax(1)
        return _half(largest * (_HEADROOM / max(limits[1], 1)))

    def step(self, groups: Tensor) -> Tensor:
        """``d · scale`` of the groups named (n), (n, out)."""
        return self.d[self._blocks(groups)] * self.scales[groups]

    def minimum(self, groups: Tensor) -> Tensor:
        """``dmin · min`` of the groups named (n), (n, out)."""
        return self.dmin[self._blocks(groups)] * self.mins[groups]

    def _blocks(self, groups: Tensor) -> Tensor:
        return groups * self._layout.group // self._layout.columns

    def choose(self, group: Tensor, targets: Tensor, importance: Tensor) -> None:
        """Choose step and minimum of ``group`` (1) for ``targets`` (columns, out).

        ``importance`` (columns): the weights of the columns' squared errors.
        """
        step, origin = self._range(targets.amax(0), targets.amin(0))
        step = torch.where(step.abs() < _TINY, _TINY, step)
        scaled = targets / step / self._shares  # (shares, columns, out)
        q = self._rounding(scaled.sub_(origin / step))
        weighted = targets * importance[:, None]
        tq = weighted.mul(q).sum(1)
        q1 = importance @ q
        qq = importance @ q.square_()
        found = self._held(group, self._fit(qq, tq, q1, weighted.sum(0), importance.sum()))
        best = found[0].min(0, keepdim=True).indices
        self._keep(group, *(value.gather(0, best)[0] for value in found[1:]))

    def refit(self, group: Tensor, codes: Tensor, targets: Tensor, upper: Tensor) -> None:
        """Fit step and minimum of ``group`` to its codes and targets (columns, out) anew.

        The error is ‖(Ŵ - T) V‖², V being ``upper`` (columns, columns).
        """
        q, t, ones = upper.t() @ codes, upper.t() @ targets, upper.sum(0)
        fit = self._fit(q.square().sum(0), (q * t).sum(0), ones @ q, ones @ t, ones.square().sum())
        loss, step, minimum = self._held(group, fit)
        old_step, old_minimum = self.step(group)[0], self.minimum(group)[0]
        better = loss < fit.loss(old_step, old_minimum)
        self._keep(
            group,
            torch.where(better, step, old_step),
            torch.where(better, minimum, old_minimum),
        )

    def _fit(self, qq: Tensor, tq: Tensor, q1: Tensor, t1: Tensor, n: Tensor) -> _Fit:
        if not self._layout.has_min:  # then minima come out as zero
            q1, t1 = torch.zeros_like(q1), torch.zeros_like(t1)
        return _Fit(qq, tq, q1, t1, n)

    def _held(self, group: Tensor, fit: _Fit) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, step and minimum of the best fit that the block can hold."""
        block = self._blocks(group)
        step = fit.best_step(positive=not self._plain)
        step = self._snap(step, self.d[block][0], self._layout.scales)
        minimum = self._snap(fit.best_minimum(step), self.dmin[block][0], self._layout.mins)
        return fit.loss(step, minimum), step, minimum

    def _snap(self, value: Tensor, unit: Tensor, limits: tuple[int, int]) -> Tensor:
        return _half(value) if self._plain else _integers(value, unit, limits).mul_(unit)

    def _keep(self, group: Tensor, step: Tensor, minimum: Tensor) -> None:
        if self._plain:
            self.d[group], self.dmin[group] = step, minimum
            return
        block = self._blocks(group)
        self.scales[group] = _integers(step, self.d[block][0], self._layout.scales)
        self.mins[group] = _integers(minimum, self.dmin[block][0], self._layout.mins)

    def blocks(self, codes: Tensor) -> Blocks:
        """The matrix with rounded values ``codes`` (in, out) int8."""
        stored = self._rounding.stored(codes)
        parts = (stored, self.d, self.scales, self.dmin, self.mins)
        return Blocks(self.type, *(part.t() for part in parts))


def _half(value: Tensor) -> Tensor:
    """Rounded to finite fp16."""
    return value.clamp(-_LARGEST_HALF, _LARGEST_HALF).to(torch.float16).float()


def _integers(value: Tensor, unit: Tensor, limits: tuple[int, int]) -> Tensor:
    return (value / unit.clamp(min=_TINY)).round_().clamp_(*limits)
