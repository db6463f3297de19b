"""GPTQ as a recipe names it, on integer grids.

``feedback`` quantizes rows of a weight. Here the weights of a block are cut into pieces of rows, so
that threads have work and memory stays bounded, and the quantized pieces are joined again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from quantkit.base.parallel import Shared, parallel_map
from quantkit.calibration.needs import Needs, Propagate
from quantkit.calibration.statistics import Moment
from quantkit.methods import rtn
from quantkit.methods.gptq.feedback import Factor, Rounded, Settings, factorize, feedback
from quantkit.methods.grids import Grid, QuantizedTensor, as_grid, gram_loss
from quantkit.methods.linears import BlockResult, Linears, QuantizedLinear, output_energy
from quantkit.methods.method import AffineMethod

_LATE_BITS = 3  # up to so many a group's scale is chosen when the group is reached
_SLAB = 2048  # at most so many rows are visited together; the same for any number of threads

DampPercent = Annotated[float, Field(gt=0, lt=1)]


class Gptq(AffineMethod):
    """GPTQ, arXiv 2210.17323."""

    tag = "gptq"
    calibration = "required"

    method: Literal["gptq"]
    damp_percent: DampPercent = 0.01
    activation_order: bool = Field(default=True, description="static: no permutation is stored")
    clip_search: bool = True
    block_size: Annotated[int, Field(ge=1)] = 128
    propagate: Propagate = "original"

    def needs(self) -> Needs:
        return Needs("gram", propagate=self.propagate)

    def quantize(self, linears: Linears) -> BlockResult:
        linears.require_inputs()
        groups = [group for group in linears.inputs if linears.readers(group)]
        inputs = [
            Readers(
                group.moment,
                [linears.weights[name] for name in linears.readers(group)],
                [as_grid(linears.schemes[name]) for name in linears.readers(group)],
                group.drift,
            )
            for group in groups
        ]
        settings = Settings(
            damping=self.damp_percent,
            activation_order=self.activation_order,
            clip_search=self.clip_search,
            block_size=self.block_size,
        )
        quantized: dict[str, QuantizedLinear] = {}
        for group, results in zip(groups, quantize_readers(inputs, settings), strict=True):
            for name, rounded in zip(linears.readers(group), results, strict=True):
                report = linears.report(name, rounded.loss / output_energy(group, name), "outputs")
                report = replace(report, damping=rounded.damping)
                quantized[name] = QuantizedLinear(rounded.tensor, report)
        return BlockResult({name: quantized[name] for name in linears.weights})

    @classmethod
    def describes(cls, section: Mapping[str, Any]) -> bool:
        return section.get("method") == "gptq" and not names_a_mix(section)


def names_a_mix(section: Mapping[str, Any]) -> bool:
    """Whether a recipe wants GPTQ on the grids of llama.cpp's types, which need no bits."""
    return section.get("format") == "gguf" and ("mix" in section or "bits" not in section)


@dataclass(frozen=True)
class Readers:
    """The linears that read one input, which share the factor of its Hessian.

    moment: of the input; weights: (out, in) of any float dtype, with their grids; drift:
    (X - Y)ᵀ Y (in, in), where the moment is of Y, which the quantized model reads, and X is what
    the unquantized one reads. Losses are then those of the corrected weights, and count λ too.
    """

    moment: Moment
    weights: Sequence[Tensor]
    grids: Sequence[Grid]
    drift: Tensor | None = None

    @property
    def late_group(self) -> int | None:
        """Columns of a group, where all linears have the same and few bits."""
        width = self.weights[0].shape[1]
        groups = {grid.columns(width) for grid in self.grids}
        few = all(grid.bits <= _LATE_BITS for grid in self.grids)
        return groups.pop() if few and len(groups) == 1 and groups != {width} else None


@dataclass(frozen=True, eq=False)
class _Piece:
    """Rows of weights on one grid, whose columns are visited together: views of the weights."""

    parts: Sequence[Tensor]
    grid: Grid
    factor: Shared[Factor | None]

    def effort(self) -> int:
        columns = self.parts[0].shape[1]
        # Visiting a column has a cost of its own, about that of a thousand more weights.
        return sum(map(len, self.parts)) * columns * (columns + 1000)


def quantize_readers(inputs: Sequence[Readers], settings: Settings) -> list[list[Rounded]]:
    """Quantize the readers of several inputs; results in the order of inputs and weights."""
    threads = torch.get_num_threads()
    factors = [
        Shared(partial(factorize, r.moment, settings, r.late_group, r.drift, threads))
        for r in inputs
    ]
    cut = [_cut(readers, factor) for readers, factor in zip(inputs, factors, strict=True)]
    # The widest input takes longest to factorize, on one thread: pieces of the others fill the
    # rest meanwhile.
    widest = sorted(range(len(inputs)), key=lambda place: -inputs[place].weights[0].shape[1])
    pieces = [
        piece
        for place in reversed(widest)
        for piece in sorted(cut[place], key=_Piece.effort, reverse=True)
    ]
    work: list[Callable[[], Any]] = [factors[place] for place in widest]
    work += [partial(_quantize, piece, settings) for piece in pieces]
    results = parallel_map(lambda job: job(), work, inputs[0].weights[0].device)[len(inputs) :]
    done = dict(zip(pieces, results, strict=True))
    return [
        _nearest(readers)
        if parts[0].factor() is None
        else _join(readers, iter([done[part] for part in parts]))
        for readers, parts in zip(inputs, cut, strict=True)
    ]


def _by_grid(readers: Readers) -> list[tuple[Grid, list[int]]]:
    """Each grid with the places of its weights."""
    return [
        (grid, [place for place, other in enumerate(readers.grids) if other == grid])
        for grid in dict.fromkeys(readers.grids)
    ]


def _cut(readers: Readers, factor: Shared[Factor | None]) -> list[_Piece]:
    return [
        _Piece(parts, grid, factor)
        for grid, places in _by_grid(readers)
        for parts in _slabs([readers.weights[place] for place in places], _slab(readers))
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


def _slab(readers: Readers) -> int:
    """Rows whose columns are visited together: few enough to keep a few copies of them small."""
    return min(_SLAB, max(_SLAB // 4, _SLAB**2 // 2 // readers.weights[0].shape[1]))


def _join(readers: Readers, pieces: Iterator[Rounded]) -> list[Rounded]:
    """Put the rows of every weight together again."""
    joined: dict[int, Rounded] = {}
    for grid, places in _by_grid(readers):
        heights = [len(readers.weights[place]) for place in places]
        parts = list(itertools.islice(pieces, -(-sum(heights) // _slab(readers))))
        tensors = [part.tensor for part in parts]
        columns = (
            [tensor.codes for tensor in tensors],
            [tensor.scales for tensor in tensors],
            [tensor.zeros for tensor in tensors],
            [part.losses for part in parts],
        )
        divided = [torch.cat(column).split(heights) for column in columns]
        for place, codes, scales, zeros, losses in zip(places, *divided, strict=True):
            tensor = QuantizedTensor(grid, codes, scales, zeros)
            joined[place] = Rounded(tensor, losses, parts[0].damping)
    return [joined[place] for place in range(len(readers.weights))]


def _nearest(readers: Readers) -> list[Rounded]:
    gram = readers.moment.matrix()
    nearest = []
    for weight, grid in zip(readers.weights, readers.grids, strict=True):
        tensor = rtn.quantize(weight, grid)
        losses = gram_loss(tensor.dequantize() - weight.float(), gram)
        nearest.append(Rounded(tensor, losses, None))
    return nearest


def _quantize(piece: _Piece, settings: Settings) -> Rounded | None:
    """None where the Hessian has no factor."""
    factor = piece.factor()
    if factor is None:
        return None
    return feedback(torch.cat(list(piece.parts)), factor, piece.grid, settings)
