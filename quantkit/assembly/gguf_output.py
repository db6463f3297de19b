"""Both ends of a model in a GGUF file: the embedding, and the matrix that makes the logits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from quantkit.assembly.run import EmbeddingRows, Run
from quantkit.calibration.needs import Needs
from quantkit.calibration.passing import CalibrationPass
from quantkit.calibration.statistics import InputStatistics
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.views import ViewedSource
from quantkit.checkpoint.written import Written
from quantkit.formats.gguf.file import GgufTensorPlan
from quantkit.methods.fused import fused
from quantkit.methods.ggml.encoder import quantize_by_ggml
from quantkit.methods.ggml.types import GgmlTensor, row_bytes
from quantkit.model.stream import Stream
from quantkit.plan.gguf import GgufFilePlan

EMBEDDING = "token_embd.weight"


@dataclass(frozen=True)
class FileMatrix:
    """A matrix of the file and where its weights come from. Implements ``Matrix``.

    loaded: the checkpoint's tensor, where it is on the device that quantizes.
    """

    plan: GgufTensorPlan
    source: Checkpoint | ViewedSource
    loaded: Tensor | None = None

    @classmethod
    def of_block(
        cls,
        plan: GgufTensorPlan,
        source: Checkpoint | ViewedSource,
        block: nn.Module,
        name: str,
    ) -> FileMatrix:
        """The matrix that is made of the parameter ``name`` of a ``block`` in memory."""
        value = block.get_parameter(name).detach()
        # Nothing is read and copied to a GPU twice; but what an adapter or another dtype has
        # changed is not what the file is made of.
        plain = source.source if isinstance(source, ViewedSource) else source
        same = type(plain) is Checkpoint and source.dtype(str(plan.key)) == value.dtype
        return cls(plan, source, value if same and fused(value.device) else None)

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def key(self) -> str | None:
        return self.plan.key

    @property
    def type(self) -> str:
        return self.plan.type

    @property
    def shape(self) -> tuple[int, ...]:
        return self.plan.shape

    def rows(self, start: int, stop: int) -> Tensor:
        if self.loaded is None:
            return self.plan.rows(self.source, start, stop)
        transform, unit = self.plan.transform, self.plan.transform.rows
        if unit is None or start % unit or stop % unit:
            return transform.apply(self.loaded)[start:stop]
        return transform.apply(self.loaded[start:stop])

    def whole(self) -> Tensor:
        return self.plan.value(self.source)


def output_matrix(plan: GgufFilePlan, stream: Stream) -> GgufTensorPlan:
    """The tensor that makes the logits; the embedding, where it is that too."""
    # Where llama.cpp wants both, made of one tensor of the checkpoint, the embedding comes first.
    return [tensor for tensor in plan.file.tensors if tensor.key == stream.output_key][-1]


def measure_output(run: Run, stream: Stream) -> InputStatistics:
    """What the output matrix reads in the unquantized model."""
    assert run.rows is not None
    hidden = run.hidden_states("before", kept=False)
    calibration = CalibrationPass(stream, run.rows, Needs("gram"), hidden=hidden)
    count = len(stream.skeleton.layers)
    with run.progress.task("measure what the output matrix reads", count) as task:
        for index in range(count):
            with stream.block(index) as block:
                calibration.carry(index, block, lambda: None)
            task.advance(doing=f"layer {index + 1} of {count}")
        return calibration.output()


def embedding_rows(
    run: Run, plan: GgufFilePlan, path: Path, finished: Iterable[Written]
) -> EmbeddingRows:
    """The embedding's rows as engines will read them.

    They come from the file at ``path`` where the embedding is among the ``finished`` tensors;
    otherwise they are quantized as ggml will do it.
    """
    [tensor] = [tensor for tensor in plan.file.tensors if tensor.name == EMBEDDING]
    written = next((done for done in finished if done.name == EMBEDDING), None)
    columns = tensor.shape[1]
    size = row_bytes(tensor.type, columns)

    def quantized(start: int, stop: int) -> Tensor:
        if written is None:
            rows = tensor.rows(run.checkpoint, start, stop)
            return quantize_by_ggml(rows, tensor.type).dequantize()
        with path.open("rb") as file:
            file.seek(written.start + start * size)
            data = bytearray(file.read((stop - start) * size))
        blocks = torch.frombuffer(data, dtype=torch.uint8).view(stop - start, size)
        return GgmlTensor(tensor.type, blocks, (stop - start, columns)).dequantize()

    return quantized
