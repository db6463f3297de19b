"""Matrices of a GGUF file with error feedback, in pieces of rows for several threads."""

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

_ROWS = 2048  # of a piece
_SAMPLE_STRIDE = 8  # the size of the outputs is estimated on every eighth row
_CPU = torch.device("cpu")


def quantize_matrices(
    inputs: Sequence[InputStatistics], matrices: Mapping[str, Matrix], damping: float
) -> dict[str, QuantizedLinear]:
    """Quantize the matrices that read ``inputs``; the result is by their names in the file.

    matrices: by the names of the consumers. The result lacks those of types without error feedback,
    and those whose input's hessian has no factor.
    """
    # The widest first, so that no thread is left with it alone at the end.
    groups = sorted(inputs, key=lambda group: -group.width)
    threads = torch.get_num_threads()

    def factorize(group: InputStatistics) -> feedback.Factorization | None:
        if group.width % feedback.WIDEST_GROUP:
            return None
        return feedback.factorize_orders(group.moment, damping, group.drift, threads)

    factors = parallel_map(factorize, groups, _CPU)
    return _quantize(
        [
            (matrices[consumer], factorized, float(group.energy[consumer]))
            for group, factorized in zip(groups, factors, strict=True)
            for consumer in group.consumers
            if factorized is not None and matrices[consumer].type in feedback.FEEDBACK_TYPES
        ]
    )


def quantize_output_matrix(
    inputs: InputStatistics, matrix: Matrix, damping: float
) -> dict[str, QuantizedLinear]:
    """Quantize the matrix that makes the logits, which reads ``inputs``.

    The result is by its name in the file; empty where it can't be quantized with error feedback.
    """
    if matrix.type not in feedback.FEEDBACK_TYPES or inputs.width % feedback.WIDEST_GROUP:
        return {}
    threads = torch.get_num_threads()
    factor = feedback.factorize_orders(inputs.moment, damping, inputs.drift, threads)
    if factor is None:
        return {}
    gram = inputs.moment.matrix().cpu()

    # Nobody has run the matrix, so the energy of its outputs comes from the Gram matrix too.
    def energy(start: int) -> float:
        rows = matrix.rows(start, start + _ROWS)
        return sum_of(gram_loss(rows[::_SAMPLE_STRIDE].float(), gram)) * _SAMPLE_STRIDE

    energies = parallel_map(energy, range(0, matrix.shape[0], _ROWS), _CPU)
    return _quantize([(matrix, factor, math.fsum(energies))])


def _quantize(
    work: Sequence[tuple[Matrix, feedback.Factorization, float]],
) -> dict[str, QuantizedLinear]:
    """Quantize matrices, each with the factorization of its input and the energy of its outputs."""
    pieces = [
        (matrix, factor, start)
        for matrix, factor, _ in work
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
    for matrix, _, energy in work:
        parts = [next(rounded) for _ in range(0, matrix.shape[0], _ROWS)]
        blocks = torch.cat([part.tensor.blocks for part in parts])
        error = math.fsum(part.loss for part in parts) / max(energy, 1e-30)
        tensor = GgmlTensor(matrix.type, blocks, matrix.shape)
        report = LayerReport(matrix.name, matrix.type, error, "outputs")
        quantized[matrix.name] = QuantizedLinear(tensor, report)
    return quantized
