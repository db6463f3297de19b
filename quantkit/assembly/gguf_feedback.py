"""The tensors of a GGUF file whose codes are chosen with error feedback."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from quantkit.assembly.run import Run
from quantkit.base.errors import InputError
from quantkit.base.parallel import spread
from quantkit.calibration.statistics import InputStatistics
from quantkit.formats.gguf.file import GgufTensorPlan
from quantkit.formats.gguf.writer import Made, WrittenTensor
from quantkit.methods.ggml import feedback as ggml_feedback
from quantkit.methods.ggml import types as ggml
from quantkit.methods.ggml.types import GgmlTensor, row_bytes
from quantkit.methods.grids import gram_loss, total
from quantkit.model.stream import Stream
from quantkit.plan.linears import GgufFilePlan
from quantkit.recipes.recipe import GptqGguf

EMBEDDING = "token_embd.weight"
# Rows of a matrix that is the embedding too are also read one by one: damping is what keeps
# them close to what they were (docs/quality.md).
_TIED_DAMPING = 0.1
_ROWS = 2048  # that one thread quantizes at a time
_SAMPLED = 8  # one in so many of them is looked at for the size of the outputs


def quantize_readers(
    run: Run,
    inputs: Sequence[InputStatistics],
    readers: dict[str, GgufTensorPlan],
    method: GptqGguf,
) -> list[Made]:
    """The readers of ``inputs`` by error feedback, each with its relative output error.

    What gets none is left out: types whose codes are not chosen one at a time, inputs whose
    Gram matrix can't be factorized.
    """
    groups = sorted(inputs, key=lambda group: -group.width)
    damping, threads = method.damp_percent, torch.get_num_threads()

    def factorize(group: InputStatistics) -> ggml_feedback.Factor | None:
        if group.width % ggml_feedback.WIDTH:
            return None
        return ggml_feedback.factorize(group.moment, damping, group.drift, threads)

    factors = spread(factorize, groups, torch.device("cpu"))
    todo = [
        (readers[consumer], factor, float(group.energy[consumer]))
        for group, factor in zip(groups, factors, strict=True)
        for consumer in group.consumers
        if factor is not None and readers[consumer].type in ggml_feedback.TYPES
    ]
    return _quantize(run, todo)


def quantize_output(
    run: Run, plan: GgufFilePlan, stream: Stream, inputs: InputStatistics, method: GptqGguf
) -> list[Made]:
    """The matrix of the output by error feedback, where that can be; the embedding's, if tied."""
    tensor = output_matrix(plan, stream)
    if tensor.type not in ggml_feedback.TYPES or inputs.width % ggml_feedback.WIDTH:
        return []
    tied = tensor.name == EMBEDDING
    damping = max(method.damp_percent, _TIED_DAMPING) if tied else method.damp_percent
    threads = torch.get_num_threads()
    factor = ggml_feedback.factorize(inputs.moment, damping, inputs.drift, threads)
    if factor is None:
        return []
    gram = inputs.moment.matrix().cpu()

    def energy(start: int) -> float:
        rows = tensor.rows(run.checkpoint, start, start + _ROWS)
        return total(gram_loss(rows[::_SAMPLED].float(), gram)) * _SAMPLED

    found = spread(energy, range(0, tensor.shape[0], _ROWS), torch.device("cpu"))
    return _quantize(run, [(tensor, factor, math.fsum(found))])


def _quantize(
    run: Run, todo: Sequence[tuple[GgufTensorPlan, ggml_feedback.Factor, float]]
) -> list[Made]:
    """Tensors by error feedback; each with its factor, and the energy of its outputs."""
    pieces = [
        (tensor, factor, start)
        for tensor, factor, _ in todo
        for start in range(0, tensor.shape[0], _ROWS)
    ]

    def quantize(
        piece: tuple[GgufTensorPlan, ggml_feedback.Factor, int],
    ) -> ggml_feedback.Outcome:
        tensor, factor, start = piece
        rows = tensor.rows(run.checkpoint, start, start + _ROWS)
        try:
            return ggml_feedback.quantize(rows, factor, tensor.type)
        except InputError as error:
            raise InputError(error.what, where=tensor.key, fix=error.fix) from error

    done = iter(spread(quantize, pieces, torch.device("cpu")))
    made = []
    for tensor, _, energy in todo:
        parts = [next(done) for _ in range(0, tensor.shape[0], _ROWS)]
        blocks = torch.cat([part.tensor.blocks for part in parts])
        error = math.fsum(part.loss for part in parts) / max(energy, 1e-30)
        made.append(Made(tensor, GgmlTensor(tensor.type, blocks, tensor.shape), error, "outputs"))
    return made


def output_matrix(plan: GgufFilePlan, stream: Stream) -> GgufTensorPlan:
    """The tensor that makes the logits; the embedding, where it is that too."""
    # Where llama.cpp wants both of one tensor, the embedding comes first.
    return [tensor for tensor in plan.file.tensors if tensor.key == stream.output_key][-1]


def embedding_rows(
    run: Run, plan: GgufFilePlan, path: Path, finished: Iterable[WrittenTensor]
) -> Callable[[int, int], Tensor]:
    """A function from numbers to the embedding's rows, first to last + 1, as engines read them:
    from the file at ``path``, where they are ``finished``, else as ggml will quantize them."""
    [tensor] = [tensor for tensor in plan.file.tensors if tensor.name == EMBEDDING]
    written = next((done for done in finished if done.name == EMBEDDING), None)
    columns = tensor.shape[1]
    size = row_bytes(tensor.type, columns)

    def quantized(start: int, stop: int) -> Tensor:
        if written is None:
            rows = tensor.rows(run.checkpoint, start, stop)
            return ggml.quantize(rows, tensor.type).dequantize()
        with path.open("rb") as file:
            file.seek(written.start + start * size)
            data = bytearray(file.read((stop - start) * size))
        blocks = torch.frombuffer(data, dtype=torch.uint8).view(stop - start, size)
        return GgmlTensor(tensor.type, blocks, (stop - start, columns)).dequantize()

    return quantized
