"""Matrices of a GGUF file with error feedback.

On a CPU they are cut into pieces of rows for several threads. On a GPU all rows of one type that
read the same input are quantized together, and nothing is waited for until all work has been handed
to the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.base.errors import InputError
from quantkit.base.parallel import parallel_map
from quantkit.calibration.statistics import InputStatistics
from quantkit.methods.fused import fused
from quantkit.methods.ggml import feedback
from quantkit.methods.ggml.method import Matrix
from quantkit.methods.ggml.types import GgmlTensor
from quantkit.methods.grids import gram_loss, sum_of
from quantkit.methods.linears import QuantizedLinear
from quantkit.results.manifest import LayerReport

_ROWS = 2048  # of a piece
_WEIGHTS_ON_DEVICE = 1 << 27  # quantized together there, of which there are several float32 copies
_SAMPLE_STRIDE = 8  # the size of the outputs is estimated on every eighth row
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class _Input:
    """What some matrices read, and these, each with the energy of its outputs, a float64 scalar."""

    statistics: InputStatistics
    readers: Sequence[tuple[Matrix, Tensor]]

    @property
    def fused(self) -> bool:
        """Whether kernels compute where it was measured; else threads do, on the CPU."""
        return fused(self.statistics.moment.diagonal().device)

    @property
    def device(self) -> torch.device:
        """The one that computes."""
        return self.statistics.moment.diagonal().device if self.fused else _CPU


def quantize_matrices(
    inputs: Sequence[InputStatistics], matrices: Mapping[str, Matrix], damping: float
) -> dict[str, QuantizedLinear]:
    """Quantize the matrices that read ``inputs``; the result is by their names in the file.

    matrices: by the names of the consumers. The result lacks those of types without error feedback,
    and those whose input's hessian has no factor.
    """
    work = []
    # The widest first, so that no thread is left with it alone at the end.
    for group in sorted(inputs, key=lambda group: -group.width):
        readers = [
            (matrices[consumer], group.energy[consumer])
            for consumer in group.consumers
            if matrices[consumer].type in feedback.FEEDBACK_TYPES
        ]
        if readers and group.width % feedback.WIDEST_GROUP == 0:
            work.append(_Input(group, readers))
    return _quantize(work, damping)


def quantize_output_matrix(
    inputs: InputStatistics, matrix: Matrix, damping: float
) -> dict[str, QuantizedLinear]:
    """Quantize the matrix that makes the logits, which reads ``inputs``.

    The result is by its name in the file; empty where it can't be quantized with error feedback.
    """
    if matrix.type not in feedback.FEEDBACK_TYPES or inputs.width % feedback.WIDEST_GROUP:
        return {}
    read = _Input(inputs, ())
    device = read.device
    gram = inputs.moment.matrix().to(device)

    # Nobody has run the matrix, so the energy of its outputs comes from the Gram matrix too.
    def energies(start: int) -> Tensor:
        rows = matrix.rows(start, start + _ROWS)[::_SAMPLE_STRIDE]
        return gram_loss(rows.to(device).float(), gram)

    found = parallel_map(energies, range(0, matrix.shape[0], _ROWS), device)
    if read.fused:
        energy = torch.cat(found).double().sum() * _SAMPLE_STRIDE
    else:
        exact = math.fsum(sum_of(part) * _SAMPLE_STRIDE for part in found)
        energy = torch.tensor(exact, dtype=torch.float64)
    return _quantize([_Input(inputs, [(matrix, energy)])], damping)


def _quantize(work: Sequence[_Input], damping: float) -> dict[str, QuantizedLinear]:
    if not work:
        return {}
    return (_on_device if work[0].fused else _by_threads)(work, damping)


def _by_threads(work: Sequence[_Input], damping: float) -> dict[str, QuantizedLinear]:
    threads = torch.get_num_threads()

    def factorize(read: _Input) -> feedback.Factorization | None:
        group = read.statistics
        return feedback.factorize_orders(group.moment, damping, group.drift, threads)

    factors = parallel_map(factorize, work, _CPU)
    found = [
        (matrix, factor, float(energy))
        for read, factor in zip(work, factors, strict=True)
        for matrix, energy in read.readers
        if factor is not None
    ]
    pieces = [
        (matrix, factor, start)
        for matrix, factor, _ in found
        for start in range(0, matrix.shape[0], _ROWS)
    ]

    def quantize(piece: tuple[Matrix, feedback.Factorization, int]) -> feedback.RoundedMatrix:
        matrix, factor, start = piece
        rows = matrix.rows(start, start + _ROWS)
        try:
            return feedback.quantize_with_feedback(rows, factor, matrix.type)
        except InputError as error:
            raise InputError(error.what, where=matrix.key, fix=error.fix) from error

    rounded = iter(parallel_map(quantize, pieces, _CPU))
    quantized = {}
    for matrix, _, energy in found:
        parts = [next(rounded) for _ in range(0, matrix.shape[0], _ROWS)]
        blocks = torch.cat([part.tensor.blocks for part in parts])
        loss = math.fsum(part.loss for part in parts)
        quantized[matrix.name] = _linear(matrix, blocks, loss, energy)
    return quantized


def _linear(matrix: Matrix, blocks: Tensor, loss: float, energy: float) -> QuantizedLinear:
    tensor = GgmlTensor(matrix.type, blocks, matrix.shape)
    error = loss / max(energy, 1e-30)
    return QuantizedLinear(tensor, LayerReport(matrix.name, matrix.type, error, "outputs"))


@dataclass(frozen=True)
class _OnDevice:
    """A matrix whose codes are chosen.

    blocks: (out, bytes) uint8; figures: the loss, the energy of the outputs, and whether all
    weights are finite, (3,) float64.
    """

    matrix: Matrix
    blocks: Tensor
    figures: Tensor


def _on_device(work: Sequence[_Input], damping: float) -> dict[str, QuantizedLinear]:
    # Read together, since the device is waited for.
    heavy = torch.stack([feedback.heavy_tailed(read.statistics.moment) for read in work]).tolist()
    results, factorized = [], []
    for read, tail in zip(work, heavy, strict=True):
        group = read.statistics
        factors, whole = feedback.attempt_orders(group.moment, damping, group.drift, heavy=tail)
        results.append(_all_readers(read, factors))
        factorized.append(whole.all())
    for place, whole in enumerate(torch.stack(factorized).tolist()):
        if not whole:  # more damping is needed, which is rare
            group = work[place].statistics
            other = feedback.factorize_orders(group.moment, damping, group.drift)
            results[place] = [] if other is None else _all_readers(work[place], other)
    found = [result for of_one in results for result in of_one]
    quantized = {}
    figures = torch.stack([result.figures for result in found]).tolist() if found else []
    for result, (loss, energy, finite) in zip(found, figures, strict=True):
        if not finite:
            raise InputError(feedback.NOT_FINITE, where=result.matrix.key)
        linear = _linear(result.matrix, result.blocks.cpu(), loss, energy)
        quantized[result.matrix.name] = linear
    return quantized


def _all_readers(read: _Input, factors: feedback.Factorization) -> list[_OnDevice]:
    """The matrices that read one input; those of one type together."""
    results = []
    for type in dict.fromkeys(matrix.type for matrix, _ in read.readers):
        of_type = [(matrix, energy) for matrix, energy in read.readers if matrix.type == type]
        blocks, losses, finite = [], [], []
        for rows in _slabs([matrix for matrix, _ in of_type], read.device):
            rounded = feedback.quantize_rows(rows, factors, type)
            blocks.append(rounded.blocks)
            losses.append(rounded.losses)
            finite.append(rows.isfinite().all(1))
        heights = [matrix.shape[0] for matrix, _ in of_type]
        divided = [torch.cat(parts).split(heights) for parts in (blocks, losses, finite)]
        for (matrix, energy), packed, lost, whole in zip(of_type, *divided, strict=True):
            loss = lost.double().sum() * factors.mean
            figures = torch.stack((loss, energy.to(loss.device), whole.all().double()))
            results.append(_OnDevice(matrix, packed, figures))
    return results


def _slabs(matrices: Sequence[Matrix], device: torch.device) -> Iterator[Tensor]:
    """The rows of all matrices, one after the other, as many at once as there is room for."""
    room = max(_ROWS, _WEIGHTS_ON_DEVICE // matrices[0].shape[1])
    parts: list[Tensor] = []
    for matrix in matrices:
        for start in range(0, matrix.shape[0], _ROWS):
            rows = matrix.rows(start, start + _ROWS).to(device)
            if sum(map(len, parts)) + len(rows) > room:
                yield torch.cat(parts)
                parts = []
            parts.append(rows)
    yield torch.cat(parts)
