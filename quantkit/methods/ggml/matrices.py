"""Whole matrices of a GGUF file with error feedback: their rows in pieces, for threads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from quantkit.base.errors import InputError
from quantkit.base.parallel import parallel_map
from quantkit.calibration.statistics import InputStatistics
from quantkit.methods.ggml import feedback
from quantkit.methods.ggml.method import Matrix
from quantkit.methods.ggml.types import GgmlTensor
from quantkit.methods.grids import gram_loss, sum_of
from quantkit.methods.linears import QuantizedLinear
from quantkit.results.manifest import LayerReport

_ROWS = 2048  # that one thread quantizes at a time
_SAMPLED = 8  # one row in so many is used to estimate the size of the outputs
_CPU = torch.device("cpu")


def quantize_matrices(
    inputs: Sequence[InputStatistics], matrices: Mapping[str, Matrix], damping: float
) -> dict[str, QuantizedLinear]:
    """The matrices that read ``inputs``, by name in the file, with their relative output errors.

    matrices: by the name of the consumer. Left out are types whose codes are not chosen one at a
    time, and readers of inputs whose Gram matrix can't be factorized.
    """
    groups = sorted(inputs, key=lambda group: -group.width)
    threads = torch.get_num_threads()

    def factorize(group: InputStatistics) -> feedback.Factor | None:
        if group.width % feedback.WIDTH:
            return None
        return feedback.factorize(group.moment, damping, group.drift, threads)

    factors = parallel_map(factorize, groups, _CPU)
    return _quantize(
        [
            (matrices[consumer], factor, float(group.energy[consumer]))
            for group, factor in zip(groups, factors, strict=True)
            for consumer in group.consumers
            if factor is not None and matrices[consumer].type in feedback.TYPES
        ]
    )


def quantize_output_matrix(
    inputs: InputStatistics, matrix: Matrix, damping: float
) -> dict[str, QuantizedLinear]:
    """The one matrix that reads ``inputs``, by its name; empty where that can't be done."""
    if matrix.type not in feedback.TYPES or inputs.width % feedback.WIDTH:
        return {}
    threads = torch.get_num_threads()
    factor = feedback.factorize(inputs.moment, damping, inputs.drift, threads)
    if factor is None:
        return {}
    gram = inputs.moment.matrix().cpu()

    def energy(start: int) -> float:
        rows = matrix.rows(start, start + _ROWS)
        return sum_of(gram_loss(rows[::_SAMPLED].float(), gram)) * _SAMPLED

    energies = parallel_map(energy, range(0, matrix.shape[0], _ROWS), _CPU)
    return _quantize([(matrix, factor, math.fsum(energies))])


def _quantize(
    work: Sequence[tuple[Matrix, feedback.Factor, float]],
) -> dict[str, QuantizedLinear]:
    """Matrices with the factor of what they read, and the energy of their outputs."""
    pieces = [
        (matrix, factor, start)
        for matrix, factor, _ in work
        for start in range(0, matrix.shape[0], _ROWS)
    ]

    def quantize(piece: tuple[Matrix, feedback.Factor, int]) -> feedback.Outcome:
        matrix, factor, start = piece
        rows = matrix.rows(start, start + _ROWS)
        try:
            return feedback.quantize(rows, factor, matrix.type)
        except InputError as error:
            raise InputError(error.what, where=matrix.key, fix=error.fix) from error

    done = iter(parallel_map(quantize, pieces, _CPU))
    quantized = {}
    for matrix, _, energy in work:
        parts = [next(done) for _ in range(0, matrix.shape[0], _ROWS)]
        blocks = torch.cat([part.tensor.blocks for part in parts])
        error = math.fsum(part.loss for part in parts) / max(energy, 1e-30)
        tensor = GgmlTensor(matrix.type, blocks, matrix.shape)
        report = LayerReport(matrix.name, matrix.type, error, "outputs")
        quantized[matrix.name] = QuantizedLinear(tensor, report)
    return quantized
