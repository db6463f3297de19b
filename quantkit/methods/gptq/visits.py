"""Visiting the columns of a weight, one after the other: the inner loops of error feedback.

Columns update others by matrix products as late as possible: those of the same block after every
panel of columns, all others after every block. ``feedback`` has the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantkit.methods.fused import fused
from quantkit.methods.grids import Grid

_PANEL = 8  # columns, where no kernel visits them


@dataclass(frozen=True)
class Ranges:
    """Scales, zero points, and the lowest and highest codes minus the zero point.

    All are (groups, out) float32, so that those of one group are contiguous.
    """

    grid: Grid
    scales: Tensor
    zeros: Tensor
    lowest: Tensor
    highest: Tensor

    @classmethod
    def of(cls, grid: Grid, scale: Tensor, zero: Tensor) -> Ranges:
        """From scales and zero points (out, groups)."""
        zeros = zero.t().contiguous()
        return cls(grid, scale.t().contiguous(), zeros, -zeros, grid.levels - zeros)

    def put(self, group: Tensor, scale: Tensor, zero: Tensor) -> None:
        """Set those of one group, (out, 1), whose number is (1,) int64."""
        zeros = zero.t()
        self.scales[group], self.zeros[group] = scale.t(), zeros
        self.lowest[group], self.highest[group] = -zeros, self.grid.levels - zeros


@dataclass(frozen=True)
class Visits:
    """The columns of some rows in the order of their factor, and what visiting them gives.

    unit, pivots: see ``feedback.Factor``; groups: the group of each column, (in,) int64; original:
    the weight, and work: the targets, which errors of visited columns change, (in, out) float32;
    codes: (in, out) uint8; losses, distances: the sums of squared residuals, times the pivots, and
    of squared errors, (out,).
    """

    unit: Tensor
    pivots: Tensor
    ranges: Ranges
    groups: Tensor
    original: Tensor
    work: Tensor
    codes: Tensor
    losses: Tensor
    distances: Tensor

    @classmethod
    def of(
        cls,
        unit: Tensor,
        pivots: Tensor,
        ranges: Ranges,
        groups: Tensor,
        original: Tensor,
        work: Tensor,
    ) -> Visits:
        """Before the first visit."""
        codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
        losses, distances = torch.zeros(2, work.shape[1], device=work.device)
        return cls(
            unit=unit,
            pivots=pivots,
            ranges=ranges,
            groups=groups,
            original=original,
            work=work,
            codes=codes,
            losses=losses,
            distances=distances,
        )

    def block(self, start: int, end: int) -> None:
        """Visit the columns from ``start`` to before ``end``, the last one first."""
        errors = torch.empty_like(self.work[start:end])
        if fused(errors.device):
            self._by_kernel(start, end, errors)
        else:
            self._by_columns(start, end, errors)
        # In one product, for all columns that are visited later.
        self.work[:start].addmm_(self.unit[start:end, :start].t(), errors)
        self.distances.add_(errors.square_().sum(0))

    def _by_kernel(self, start: int, end: int, errors: Tensor) -> None:
        from quantkit.methods.gptq.kernel import PANEL, visit_panel

        for high in range(end, start, -PANEL):
            low = max(start, high - PANEL)
            part = errors[low - start : high - start]
            with torch.cuda.device_of(self.work):  # Triton launches on the current device
                visit_panel(
                    slice(low, high),
                    work=self.work,
                    original=self.original,
                    unit=self.unit,
                    pivots=self.pivots,
                    groups=self.groups,
                    scales=self.ranges.scales,
                    zeros=self.ranges.zeros,
                    levels=self.ranges.grid.levels,
                    errors=part,
                    codes=self.codes,
                    losses=self.losses,
                )
            if low > start:
                self.work[start:low].addmm_(self.unit[low:high, start:low].t(), part)

    def _by_columns(self, start: int, end: int, errors: Tensor) -> None:
        work, steps = self.work, torch.empty_like(errors)
        # A list of numbers: to read one from a tensor at each column would take longer.
        groups = self.groups[start:end].tolist()
        for high in range(end, start, -_PANEL):
            low = max(start, high - _PANEL)
            part = slice(low - start, high - start)
            _visit(
                work[low:high],
                self.original[low:high],
                self.unit[low:high, low:high],
                self.ranges,
                groups[part],
                errors[part],
                steps[part],
            )
            work[start:low].addmm_(self.unit[low:high, start:low].t(), errors[part])
        # ``_visit`` has left the residuals in the place of the targets.
        residual = work[start:end].mul_(self.pivots[start:end, None])
        self.losses.add_(residual.square_().sum(0))
        self.codes[start:end] = steps.add_(self.ranges.zeros[groups])


def _visit(
    work: Tensor,
    original: Tensor,
    unit: Tensor,
    ranges: Ranges,
    groups: Sequence[int],
    errors: Tensor,
    steps: Tensor,
) -> None:
    """Choose the codes of a few columns, from the last to the first.

    work: the targets; original: the weight; unit: L's part for these columns, (columns, columns);
    groups: the group of each column. The others are (columns, out). On return ``work`` holds the
    residual of each target, ``errors`` the weight minus its rounded values, and ``steps`` the codes
    minus the zero points.
    """
    # The vectors are so short that the overhead of each call decides, which is much smaller in
    # numpy than in torch. torch has functions of the same names for other devices.
    xp: Any = torch
    rint: Any = torch.round
    arrays: list[Any] = [work, original, unit, ranges.scales, ranges.lowest, ranges.highest]
    arrays += [errors, steps]
    if work.device.type == "cpu":
        xp, rint, arrays = np, np.rint, [array.numpy() for array in arrays]
    targets, originals, factors, scales, lowest, highest, all_errors, all_steps = arrays
    # The first row holds a column's value until the products below overwrite it.
    change = xp.empty_like(targets)
    for k in range(len(groups) - 1, -1, -1):
        target, error, step, group = targets[k], all_errors[k], all_steps[k], groups[k]
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
