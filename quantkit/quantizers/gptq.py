"""GPTQ: codes chosen column by column, each column's error carried on to those that follow.

Frantar et al., arXiv 2210.17323, in the form of Babai's nearest plane (Chen et al., arXiv
2507.18553), which chooses the same codes without inverting anything. With G = XᵀX over the
calibration tokens, H = G + λI = L Lᵀ and D = W - Ŵ, the output error is the squared norm of D L,
whose column k is L_kk D_k + Σ_{i>k} D_i L_ik. Visiting the columns from the last to the first,
column k is therefore best rounded after adding Σ_{i>k} D_i L_ik / L_kk to it. What that leaves,
squared and summed, is the loss.

Columns are done in blocks: inside a block one at a time, the rest of the matrix once per block
by a matrix product.

Activation order is *static*: columns are visited by falling diagonal of G, but the groups and
their scales are those of the stored order, so that engines see no permutation (``desc_act:
false``, g_idx = k // group_size). Scales are chosen before. With three bits and fewer it pays more
to choose a group's scale when the group is reached, for the weights that will really be rounded;
then whole groups are visited by falling energy, and the columns within them.

Where inputs have drifted, each column's target is moved besides (``drift``).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from quantkit.parallel import Shared, spread
from quantkit.quantizers import rtn
from quantkit.quantizers.cholesky import cholesky_
from quantkit.quantizers.drift import compact, pull
from quantkit.quantizers.grid import (
    Grid,
    QuantizedTensor,
    fit,
    gram_loss,
    grouped,
    search_range,
    total,
)

if TYPE_CHECKING:
    from quantkit.calibration.statistics import Moment

_RETRIES = 4  # dampings tried, each ten times the one before
_CLIP_STEPS = 20
_SMALLEST_CLIP = 0.6  # share of a group's range
_INNER = 8  # columns between two products inside a block
_LATE_BITS = 3  # up to so many a group's scale is chosen when the group is reached ...
_HEAVY_TAIL = 0.6  # ... unless the median energy is below this share of the mean
_SLAB = 2048  # at most so many rows are visited together; the same for any number of threads


@dataclass(frozen=True)
class Settings:
    """damping: share of the mean diagonal added to it; block_size: columns per lazy update."""

    damping: float = 0.01
    activation_order: bool = True
    clip_search: bool = True
    block_size: int = 128


@dataclass(frozen=True)
class Outcome:
    """What GPTQ did to one matrix.

    loss: Gram loss of the result; damping: the share that was needed, None where H couldn't be
    factorized and the tensor is round-to-nearest.
    """

    tensor: QuantizedTensor
    loss: float
    damping: float | None


@dataclass(frozen=True)
class Factor:
    """L with H = L Lᵀ in ``order``, whose last column is visited first.

    unit: L with each column divided by its diagonal element, so that the diagonal is 1; pivots:
    that diagonal; importance: what a column's error counts in the choice of scales; group: columns
    of a group, where groups are visited one after the other and scales chosen when they are
    reached, else None; damping: share of the mean diagonal; ridge: λ; drift: (X - Y)ᵀ Y, None
    where inputs haven't drifted. Shared by all readers of an input.
    """

    unit: Tensor
    pivots: Tensor
    order: Tensor
    importance: Tensor
    group: int | None
    damping: float
    ridge: float
    drift: Tensor | None = None


def factorize(
    moment: Moment,
    settings: Settings,
    group: int | None = None,
    drift: Tensor | None = None,
    threads: int = 1,
) -> Factor | None:
    """Factorize a Gram matrix (in, in); None when no damping makes it positive definite.

    group: columns of the readers' groups, where choosing their scales late may pay; drift: see
    ``Problem``.
    """
    diagonal = moment.diagonal()
    mean = diagonal.mean().clamp(min=torch.finfo(diagonal.dtype).tiny)
    if group and settings.activation_order and bool(diagonal.median() < _HEAVY_TAIL * mean):
        group = None  # a few columns count, all over the matrix: their order matters more
    if not settings.activation_order:
        order = torch.arange(len(diagonal) - 1, -1, -1, device=diagonal.device)
    elif group:
        order = _by_groups(diagonal, group)
    else:
        order = torch.argsort(diagonal, stable=True)
    for attempt in range(_RETRIES):
        hessian = moment.matrix(order)
        damping = settings.damping * 10**attempt
        hessian.diagonal().add_(damping * mean)
        if cholesky_(hessian, threads):
            pivots = hessian.diagonal().clone()
            ridge = float(damping * mean)
            # With its pivot, the part of a column's error that later columns can't mend, scales fit
            # the calibration tokens more closely: with four bits and more, too closely.
            importance = pivots if group else diagonal[order].sqrt()
            unit = hessian.div_(pivots)
            pulling = None if drift is None else compact(drift, drift.device)
            return Factor(unit, pivots, order, importance, group, damping, ridge, pulling)
    return None


def _by_groups(energy: Tensor, group: int) -> Tensor:
    """Groups by rising energy, and columns within them."""
    columns = torch.arange(len(energy), device=energy.device).view(-1, group)
    columns = columns.gather(1, torch.argsort(energy[columns], stable=True))
    return columns[torch.argsort(energy[columns].sum(1), stable=True)].flatten()


@dataclass(frozen=True)
class Problem:
    """The readers of one input, whose moment is known: weights (out, in) of any float dtype and
    their grids. drift: (X - Y)ᵀ Y (in, in), where the moment is of Y and was to be of X; losses are
    then those of the corrected weights, and count λ too."""

    moment: Moment
    weights: Sequence[Tensor]
    grids: Sequence[Grid]
    drift: Tensor | None = None

    @property
    def late_group(self) -> int | None:
        """Columns of a group, where all readers have the same and few bits."""
        width = self.weights[0].shape[1]
        groups = {grid.columns(width) for grid in self.grids}
        few = all(grid.bits <= _LATE_BITS for grid in self.grids)
        return groups.pop() if few and len(groups) == 1 and groups != {width} else None


@dataclass(frozen=True, eq=False)
class _Piece:
    """Rows of readers on one grid, whose columns are visited together: views of the weights."""

    parts: Sequence[Tensor]
    grid: Grid
    factor: Shared[Factor | None]

    def effort(self) -> int:
        columns = self.parts[0].shape[1]
        return sum(map(len, self.parts)) * columns * (columns + 1000)  # a column's own cost


def quantize(problems: Sequence[Problem], settings: Settings) -> list[list[Outcome]]:
    """Quantize the readers of several inputs; outcomes in the order of problems and readers."""
    threads = torch.get_num_threads()
    factors = [
        Shared(partial(factorize, p.moment, settings, p.late_group, p.drift, threads))
        for p in problems
    ]
    cut = [_cut(problem, factor) for problem, factor in zip(problems, factors, strict=True)]
    # The widest input takes longest to factorize, on one thread: pieces of the others fill the
    # rest meanwhile.
    widest = sorted(range(len(problems)), key=lambda place: -problems[place].weights[0].shape[1])
    pieces = [
        piece
        for place in reversed(widest)
        for piece in sorted(cut[place], key=_Piece.effort, reverse=True)
    ]
    work: list[Callable[[], Any]] = [factors[place] for place in widest]
    work += [partial(_quantize, piece, settings) for piece in pieces]
    results = spread(lambda job: job(), work, problems[0].weights[0].device)[len(problems) :]
    done = dict(zip(pieces, results, strict=True))
    outcomes = []
    for problem, parts in zip(problems, cut, strict=True):
        factor = parts[0].factor()
        outcomes.append(
            _nearest(problem)
            if factor is None
            else _join(problem, factor.damping, iter([done[part] for part in parts]))
        )
    return outcomes


def _stacks(problem: Problem) -> list[tuple[Grid, list[int]]]:
    """Readers by their grid."""
    return [
        (grid, [place for place, other in enumerate(problem.grids) if other == grid])
        for grid in dict.fromkeys(problem.grids)
    ]


def _cut(problem: Problem, factor: Shared[Factor | None]) -> list[_Piece]:
    return [
        _Piece(parts, grid, factor)
        for grid, places in _stacks(problem)
        for parts in _slabs([problem.weights[place] for place in places], _slab(problem))
    ]


def _slabs(weights: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    """The rows of all weights, one after the other, in slabs of ``size``."""
    parts: list[Tensor] = []
    room = size
    for weight in weights:
        while len(weight):
            parts.append(weight[:room])
            weight = weight[room:]
            room -= len(parts[-1])
            if not room:
                yield parts
                parts, room = [], size
    if parts:
        yield parts


def _slab(problem: Problem) -> int:
    """Rows whose columns are visited together: as many as keep a few copies of them small."""
    return min(_SLAB, max(_SLAB // 4, _SLAB**2 // 2 // problem.weights[0].shape[1]))


def _join(
    problem: Problem, damping: float, done: Iterator[tuple[QuantizedTensor, Tensor]]
) -> list[Outcome]:
    """Divide again what was cut of ``problem``."""
    outcomes: dict[int, Outcome] = {}
    for grid, places in _stacks(problem):
        heights = [len(problem.weights[place]) for place in places]
        parts = list(itertools.islice(done, -(-sum(heights) // _slab(problem))))
        columns = zip(*((t.codes, t.scales, t.zeros, losses) for t, losses in parts), strict=True)
        divided = [torch.cat(column).split(heights) for column in columns]
        for place, codes, scales, zeros, losses in zip(places, *divided, strict=True):
            tensor = QuantizedTensor(grid, codes, scales, zeros)
            outcomes[place] = Outcome(tensor, total(losses), damping)
    return [outcomes[place] for place in range(len(problem.weights))]


def _nearest(problem: Problem) -> list[Outcome]:
    gram = problem.moment.matrix()
    outcomes = []
    for weight, grid in zip(problem.weights, problem.grids, strict=True):
        tensor = rtn.quantize(weight, grid)
        loss = total(gram_loss(tensor.dequantize() - weight.float(), gram))
        outcomes.append(Outcome(tensor, loss, None))
    return outcomes


def _quantize(piece: _Piece, settings: Settings) -> tuple[QuantizedTensor, Tensor] | None:
    """The tensor, and each row's Gram loss; None where there is no factor."""
    factor = piece.factor()
    if factor is None:
        return None
    weight = torch.cat(list(piece.parts))
    moved = None if factor.drift is None else _moved(weight, factor, factor.drift)
    return _feedback(weight.float(), moved, factor, piece.grid, settings)


def _moved(weight: Tensor, factor: Factor, drift: Tensor) -> Tensor:
    """How far each column's target is moved, in the order of the factor, (in, out)."""
    pulled = pull(weight, drift, factor.order).t()
    found = torch.linalg.solve_triangular(factor.unit, pulled, upper=False, unitriangular=True)
    return found.div_(factor.pivots.square()[:, None])


def _fit(
    weight: Tensor, grid: Grid, importance: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Scales and zeros (out, groups) of ``weight`` (out, in)."""
    groups = grouped(weight, grid)
    if not settings.clip_search:
        return fit(groups.amin(2), groups.amax(2), grid)
    importance = importance.view(groups.shape[1:])
    return search_range(
        weight,
        grid,
        lambda error: torch.linalg.vector_norm(error.mul_(importance), dim=2),
        steps=_CLIP_STEPS,
        smallest=_SMALLEST_CLIP,
    )


def _feedback(
    weight: Tensor, moved: Tensor | None, factor: Factor, grid: Grid, settings: Settings
) -> tuple[QuantizedTensor, Tensor]:
    """The tensor, and the Gram loss of each row (out,); ``moved``: as ``_moved`` gives it."""
    order, unit = factor.order, factor.unit
    # Transposed, so that a column is contiguous: (in, out), rows in visiting order.
    original = weight.index_select(1, order).t().contiguous()
    # With the errors of the columns visited added.
    work = original.clone() if moved is None else moved.add_(original)
    group_of = (order // grid.columns(weight.shape[1])).tolist()
    if factor.group is None:
        block = settings.block_size
        importance = torch.empty_like(factor.importance)
        importance[order] = factor.importance
        ranges = _Ranges.of(grid, *_fit(weight, grid, importance, settings))
    else:
        block = factor.group
        empty = weight.new_empty(len(weight), len(order) // block)
        ranges = _Ranges.of(grid, empty, empty.clone())
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    loss, distance = torch.zeros(2, work.shape[1], device=work.device)
    for end in range(len(order), 0, -block):
        start = max(0, end - block)
        if factor.group is not None:
            due, importance = work[start:end].t().contiguous(), factor.importance[start:end]
            ranges.put(group_of[start], *_fit(due, grid, importance, settings))
        errors = torch.empty_like(work[start:end])
        taken = torch.empty_like(errors)
        for high in range(end, start, -_INNER):
            low = max(start, high - _INNER)
            part = slice(low - start, high - start)
            _visit(
                work[low:high],
                original[low:high],
                unit[low:high, low:high],
                ranges,
                group_of[low:high],
                errors[part],
                taken[part],
            )
            work[start:low].addmm_(unit[low:high, start:low].t(), errors[part])
        work[:start].addmm_(unit[start:end, :start].t(), errors)
        left = work[start:end].mul_(factor.pivots[start:end, None])
        loss += left.square_().sum(0)
        distance += errors.square_().sum(0)
        taken += ranges.zeros[group_of[start:end]]
        codes[start:end] = taken
    stored = torch.empty_like(codes)
    stored[order] = codes
    scales, zeros = ranges.scales.t().contiguous(), ranges.zeros.t().to(torch.uint8).contiguous()
    tensor = QuantizedTensor(grid, stored.t().contiguous(), scales, zeros)
    if moved is None:
        loss.sub_(distance, alpha=factor.ridge).clamp_(min=0)
    return tensor, loss


@dataclass(frozen=True)
class _Ranges:
    """Scales, zero points and the lowest and highest codes less these, each (groups, out)."""

    grid: Grid
    scales: Tensor
    zeros: Tensor
    lowest: Tensor
    highest: Tensor

    @classmethod
    def of(cls, grid: Grid, scale: Tensor, zero: Tensor) -> _Ranges:
        """From scales and zeros (out, groups)."""
        zeros = zero.t().contiguous()
        return cls(grid, scale.t().contiguous(), zeros, -zeros, grid.levels - zeros)

    def put(self, group: int, scale: Tensor, zero: Tensor) -> None:
        """Set one group's, (out, 1)."""
        zeros = zero[:, 0]
        self.scales[group], self.zeros[group] = scale[:, 0], zeros
        self.lowest[group], self.highest[group] = -zeros, self.grid.levels - zeros


def _visit(
    work: Tensor,
    original: Tensor,
    unit: Tensor,
    ranges: _Ranges,
    groups: Sequence[int],
    errors: Tensor,
    taken: Tensor,
) -> None:
    """Choose the codes of a few columns, from the last to the first.

    All are (columns, out) but ``unit``, (columns, columns). ``work`` becomes what is left of
    each target, ``errors`` the original less what was taken, ``taken`` codes less zero points.

    So short are these vectors that what counts is the cost of a call, of which numpy's is a
    fraction of torch's; elsewhere than on a CPU it is torch's functions of the same names.
    """
    xp: Any = torch
    rint: Any = torch.round
    arrays: list[Any] = [work, original, unit, ranges.scales, ranges.lowest, ranges.highest]
    arrays += [errors, taken]
    if work.device.type == "cpu":
        xp, rint, arrays = np, np.rint, [array.numpy() for array in arrays]
    targets, originals, factors, scales, lowest, highest, wrong, steps = arrays
    change = xp.empty_like(targets)
    for k in range(len(groups) - 1, -1, -1):
        target, error, step, group = targets[k], wrong[k], steps[k], groups[k]
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
