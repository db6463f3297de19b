"""GPTQ on integer grids: its settings in a recipe, and the linears of a block as pieces of work.

``feedback`` quantizes rows of a weight. Here the weights of a block are cut into pieces of rows for
several threads, and the quantized pieces are joined again.
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
from quantkit.methods.fused import fused
from quantkit.methods.gptq.feedback import (
    Factor,
    GptqSettings,
    RoundedRows,
    attempt_factor,
    factorize,
    heavy_tailed,
    quantize_rows,
)
from quantkit.methods.grids import Grid, QuantizedTensor, as_grid, gram_loss
from quantkit.methods.linears import BlockResult, Linears, QuantizedLinear, output_energy
from quantkit.methods.method import AffineMethod

# Inputs whose factors are in memory together: a layer may have as many as it has experts.
_TOGETHER = 16
# With so many bits or fewer, a group's scale is better chosen when the group is reached
# (docs/quality.md, "Affine grids").
_LATE_BITS = 3
# The most rows of a piece. Pieces are the same for any number of threads: the products of other
# heights may be rounded otherwise.
_SLAB = 2048
# A GPU needs many rows at once.
_FUSED_WEIGHTS = 1 << 26

DampPercent = Annotated[float, Field(gt=0, lt=1)]


class Gptq(AffineMethod):
    """GPTQ, arXiv 2210.17323, on an affine integer grid."""

    tag = "gptq"
    calibration = "required"

    method: Literal["gptq"]
    damp_percent: DampPercent = 0.01
    activation_order: bool = Field(default=True, description="static: no permutation is stored")
    clip_search: bool = True
    block_size: Annotated[int, Field(ge=1)] = 128
    propagate: Propagate = "original"

    def needs(self) -> Needs:
        return Needs("gram", propagate=self.propagate, apart=True)

    def quantize(self, linears: Linears) -> BlockResult:
        linears.require_inputs()
        groups = [group for group in linears.inputs if linears.readers(group)]
        inputs = [
            Readers(
                group.moment,
                # Where the rows were spread over devices, each input may be on another one.
                [
                    linears.weights[name].to(group.moment.diagonal().device)
                    for name in linears.readers(group)
                ],
                [as_grid(linears.schemes[name]) for name in linears.readers(group)],
                group.drift,
            )
            for group in groups
        ]
        settings = GptqSettings(
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
        # In the order of the block's linears, in which they are reported and written.
        return BlockResult({name: quantized[name] for name in linears.weights})

    @classmethod
    def describes(cls, section: Mapping[str, Any]) -> bool:
        return section.get("method") == "gptq" and not names_a_mix(section)


def names_a_mix(section: Mapping[str, Any]) -> bool:
    """Whether a recipe's section means GPTQ on the grids of llama.cpp's types, by a mix."""
    # Integer grids can be written as GGUF too. A section without bits is meant for a mix even where
    # the mix is missing, so that the error is about that.
    return section.get("format") == "gguf" and ("mix" in section or "bits" not in section)


@dataclass(frozen=True)
class Readers:
    """The linears that read one input, which share the factor of its hessian.

    moment: of the input; weights, grids: of the linears, (out, in) of any float dtype; drift:
    (X - Y)ᵀ Y (in, in), where the moment is that of Y, which the quantized model reads in place of
    X, else None.
    """

    moment: Moment
    weights: Sequence[Tensor]
    grids: Sequence[Grid]
    drift: Tensor | None = None

    @property
    def late_group(self) -> int | None:
        """Columns of a group, where scales are better chosen late; else None.

        That needs few bits, and groups of one size for all linears, since they share the order in
        which columns are visited.
        """
        width = self.weights[0].shape[1]
        groups = {grid.columns(width) for grid in self.grids}
        few = all(grid.bits <= _LATE_BITS for grid in self.grids)
        return groups.pop() if few and len(groups) == 1 and groups != {width} else None


@dataclass(frozen=True, eq=False)  # compared by identity: pieces are keys of a dict
class _Piece:
    """Rows, taken from some weights on one grid, that are quantized together; all are views."""

    parts: Sequence[Tensor]
    grid: Grid
    factor: Shared[Factor | None]

    def rows(self) -> Tensor:
        """All rows, as one weight."""
        return self.parts[0] if len(self.parts) == 1 else torch.cat(list(self.parts))

    def effort(self) -> int:
        """How long the piece takes, compared with others."""
        columns = self.parts[0].shape[1]
        # Visiting a column has a cost of its own, about that of a thousand more weights in it.
        return sum(map(len, self.parts)) * columns * (columns + 1000)


def quantize_readers(inputs: Sequence[Readers], settings: GptqSettings) -> list[list[RoundedRows]]:
    """Quantize the linears that read some inputs.

    The results are in the order of ``inputs`` and of their weights. Where drift is corrected,
    losses are those of the corrected weights, and count λ too.
    """
    on_device = fused(inputs[0].weights[0].device)
    if len(inputs) > _TOGETHER and not on_device:
        some = range(0, len(inputs), _TOGETHER)
        parts = [quantize_readers(inputs[n : n + _TOGETHER], settings) for n in some]
        return [results for part in parts for results in part]
    late = _late_groups(inputs, settings)
    if on_device:
        return _quantize_on_device(inputs, late, settings)
    threads = torch.get_num_threads()
    factors = [
        Shared(partial(factorize, readers.moment, settings, group, readers.drift, threads))
        for readers, group in zip(inputs, late, strict=True)
    ]
    cut = [_cut(readers, factor) for readers, factor in zip(inputs, factors, strict=True)]
    # Factors and pieces are one list of work, so that no thread waits: the widest input takes
    # longest to factorize, so it is begun first, and meanwhile other threads quantize the pieces of
    # the narrow inputs. The largest pieces of an input come first, so that the last ones to end are
    # small.
    widest = sorted(range(len(inputs)), key=lambda place: -inputs[place].weights[0].shape[1])
    pieces = [
        piece
        for place in reversed(widest)
        for piece in sorted(cut[place], key=_Piece.effort, reverse=True)
    ]
    work: list[Callable[[], Any]] = [factors[place] for place in widest]
    work += [partial(_quantize_piece, piece, settings) for piece in pieces]
    results = parallel_map(lambda job: job(), work, inputs[0].weights[0].device)[len(inputs) :]
    by_piece = dict(zip(pieces, results, strict=True))
    return [
        _nearest(readers)
        if parts[0].factor() is None
        else _join(readers, iter([by_piece[part] for part in parts]))
        for readers, parts in zip(inputs, cut, strict=True)
    ]


def _late_groups(inputs: Sequence[Readers], settings: GptqSettings) -> list[int | None]:
    """For each input the columns of a group, where scales are to be chosen late; else None."""
    groups = [readers.late_group for readers in inputs]
    if not settings.activation_order or not any(groups):
        return groups
    # Read together, since a device is waited for.
    heavy = _read([heavy_tailed(readers.moment) for readers in inputs])
    return [None if skip else group for group, skip in zip(groups, heavy, strict=True)]


def _quantize_on_device(
    inputs: Sequence[Readers], late: Sequence[int | None], settings: GptqSettings
) -> list[list[RoundedRows]]:
    """The same on a GPU, which is never waited for until all work has been handed to it."""
    results, factorized = [], []
    for readers, group in zip(inputs, late, strict=True):
        factor, whole = attempt_factor(readers.moment, settings, group, readers.drift)
        results.append(_with_factor(readers, factor, settings))
        factorized.append(whole)
    for place, enough in enumerate(_read(factorized)):
        if not enough:  # more damping is needed, which is rare
            readers = inputs[place]
            other = factorize(readers.moment, settings, late[place], readers.drift)
            results[place] = (
                _nearest(readers) if other is None else _with_factor(readers, other, settings)
            )
    return results


def _read(flags: Sequence[Tensor]) -> list[bool]:
    """The values of bool scalars, on one device or several."""
    return torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()


def _with_factor(readers: Readers, factor: Factor, settings: GptqSettings) -> list[RoundedRows]:
    pieces = _cut(readers, Shared(lambda: factor))
    rounded = (quantize_rows(piece.rows(), factor, piece.grid, settings) for piece in pieces)
    return _join(readers, rounded)


def _by_grid(readers: Readers) -> list[tuple[Grid, list[int]]]:
    """Each grid, with the indices of the weights that are on it."""
    return [
        (grid, [index for index, other in enumerate(readers.grids) if other == grid])
        for grid in dict.fromkeys(readers.grids)
    ]


def _cut(readers: Readers, factor: Shared[Factor | None]) -> list[_Piece]:
    return [
        _Piece(parts, grid, factor)
        for grid, indices in _by_grid(readers)
        for parts in _slabs([readers.weights[index] for index in indices], _slab_rows(readers))
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


def _slab_rows(readers: Readers) -> int:
    """Rows of a piece: fewer of wide weights, since several float32 copies are in memory."""
    weight = readers.weights[0]
    if fused(weight.device):
        return max(_SLAB, _FUSED_WEIGHTS // weight.shape[1])
    return min(_SLAB, max(_SLAB // 4, _SLAB**2 // 2 // weight.shape[1]))


def _join(readers: Readers, pieces: Iterator[RoundedRows]) -> list[RoundedRows]:
    """The weights of ``readers`` from their pieces, in the order in which they were cut."""
    joined: dict[int, RoundedRows] = {}
    for grid, indices in _by_grid(readers):
        heights = [len(readers.weights[index]) for index in indices]
        parts = list(itertools.islice(pieces, -(-sum(heights) // _slab_rows(readers))))
        tensors = [part.tensor for part in parts]
        columns = (
            [tensor.codes for tensor in tensors],
            [tensor.scales for tensor in tensors],
            [tensor.zeros for tensor in tensors],
            [part.losses for part in parts],
        )
        divided = [torch.cat(column).split(heights) for column in columns]
        for index, codes, scales, zeros, losses in zip(indices, *divided, strict=True):
            tensor = QuantizedTensor(grid, codes, scales, zeros)
            joined[index] = RoundedRows(tensor, losses, parts[0].damping)
    return [joined[index] for index in range(len(readers.weights))]


def _nearest(readers: Readers) -> list[RoundedRows]:
    """The nearest codes, for an input whose hessian has no factor."""
    gram = readers.moment.matrix()
    nearest = []
    for weight, grid in zip(readers.weights, readers.grids, strict=True):
        tensor = rtn.quantize(weight, grid)
        losses = gram_loss(tensor.dequantize() - weight.float(), gram)
        nearest.append(RoundedRows(tensor, losses, None))
    return nearest


def _quantize_piece(piece: _Piece, settings: GptqSettings) -> RoundedRows | None:
    """Quantize the rows of a piece; None where the hessian has no factor."""
    factor = piece.factor()
    if factor is None:
        return None
    return quantize_rows(piece.rows(), factor, piece.grid, settings)
