"""GPTQ of all that reads some inputs of a block.

``gptq_feedback`` quantizes; here matrices are cut into pieces of rows, for threads and for memory,
and what comes of them is joined again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantkit.base.parallel import Shared, spread
from quantkit.methods import rtn
from quantkit.methods.gptq.feedback import Factor, Settings, factorize, feedback
from quantkit.methods.grids import Grid, QuantizedTensor, gram_loss, total

if TYPE_CHECKING:
    from quantkit.calibration.statistics import Moment

_LATE_BITS = 3  # up to so many a group's scale is chosen when the group is reached
_SLAB = 2048  # at most so many rows are visited together; the same for any number of threads


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
    return feedback(torch.cat(list(piece.parts)), factor, piece.grid, settings)
