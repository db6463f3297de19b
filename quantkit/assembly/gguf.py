"""Artifacts in GGUF: one file, whose matrices are quantized as rows pass or when it is written."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import cached_property, reduce
from pathlib import Path

import torch
from torch import Tensor, nn

from quantkit.assembly.blocks import assemble, put, quantize_linears
from quantkit.assembly.gguf_output import (
    EMBEDDING,
    FileMatrix,
    embedding_rows,
    measure_output,
    output_matrix,
)
from quantkit.assembly.journal import Part, Step
from quantkit.assembly.run import EmbeddingRows, Run
from quantkit.base.background import Background
from quantkit.calibration.corrected import CorrectedPass
from quantkit.calibration.needs import Needs
from quantkit.calibration.passing import CalibrationPass
from quantkit.calibration.statistics import InputStatistics
from quantkit.checkpoint.written import Written
from quantkit.formats.gguf import grids
from quantkit.formats.gguf.file import GgufTensorPlan
from quantkit.formats.gguf.transforms import column_order
from quantkit.formats.gguf.writer import write_blocks, write_file
from quantkit.methods.fused import fused
from quantkit.methods.ggml.blocks import LAYOUTS, decoded
from quantkit.methods.ggml.encoder import quantize_by_ggml
from quantkit.methods.ggml.method import MixMethod
from quantkit.methods.ggml.types import GgmlTensor
from quantkit.methods.grids import QuantizedTensor
from quantkit.methods.linears import BlockResult, QuantizedLinear
from quantkit.model.skeleton import Skeleton
from quantkit.model.stream import Stream
from quantkit.plan.gguf import GgufFilePlan
from quantkit.plan.linears import LinearPlan
from quantkit.results.manifest import LayerReport


def write_gguf(run: Run, plan: GgufFilePlan, name: str) -> list[LayerReport]:
    """Write the planned file into ``run.directory``; ``name``: the model's.

    Linears on integer grids, and matrices with error feedback, are quantized as the calibration
    rows pass through the blocks. All other tensors are quantized by ggml when the file is written,
    with importance weights where rows have passed.
    """
    path = run.directory / f"{name}-{plan.file.mix.upper()}.gguf"
    label = f"quantize ({plan.method}, {plan.file.mix})"
    if plan.linears is not None:
        with Background(threaded=run.background) as later:
            grids = _Grids(run, plan, plan.linears, path, later)
            assemble(run, grids.stream, grids, label)
    elif isinstance(plan.settings, MixMethod) and run.rows is not None:
        with Background(threaded=run.background) as later:
            mix = _Mix(run, plan, plan.settings, path, later)
            assemble(run, mix.stream, mix, label)
    elif not _intact(path, run.journal.steps):
        run.progress.note("the unfinished work is damaged: starting again")
        run.journal.forget()
    # As text until they are needed: of thousands of experts they are hundreds of megabytes.
    texts = {key: text for step in run.journal.steps for key, text in step.importance.items()}

    def importance(key: str) -> Tensor | None:
        return _decode(texts[key]) if key in texts else None

    with run.progress.task(f"write {path.name}", sum(1 for _ in plan.file.parts)) as task:
        write_file(
            path,
            plan.file,
            run.checkpoint,
            importance,
            finished=_tensors(run.journal.steps),
            record=lambda written, report: run.journal.record(
                Step("tensor", (written,), (report,))
            ),
            progress=task,
        )
    reports = {layer.name: layer for step in run.journal.steps for layer in step.layers}
    routed = {key: counts for step in run.journal.steps for key, counts in step.routed.items()}
    return [_counted(reports[part.name], routed.get(str(part.key))) for part in plan.file.parts]


def _counted(report: LayerReport, counts: Sequence[int] | None) -> LayerReport:
    """The report of an expert's matrix, with how many of the tokens measured were routed to it."""
    if counts is None:
        return report
    tokens, measured = counts
    return replace(report, tokens=tokens, all_tokens=True if tokens < measured else None)


def _tensors(steps: Sequence[Step]) -> list[Written]:
    return [tensor for step in steps for tensor in step.tensors]


def _intact(path: Path, steps: Sequence[Step]) -> bool:
    """Whether the unfinished file holds what the steps have written."""
    return all(tensor.intact(path) for tensor in _tensors(steps))


class _Parts:
    """What both kinds of GGUF artifact share of ``blocks.Parts``."""

    def __init__(
        self, run: Run, plan: GgufFilePlan, path: Path, stream: Stream, later: Background
    ) -> None:
        self.run, self.plan, self.path, self.stream = run, plan, path, stream
        self._later = later  # writes one part beside the work on the next
        self._planned: dict[str | None, list[GgufTensorPlan]] = {}
        for part in plan.file.parts:
            self._planned.setdefault(part.key, []).append(part)
        self._source = plan.file.viewed(run.checkpoint)
        self._known: Written | None = None  # any tensor that the file holds

    def resume(self, steps: Sequence[Step]) -> bool:
        self._known = next(iter(_tensors(steps)), None)
        return _intact(self.path, steps)

    def restart(self) -> None:
        self._known = None  # the file's bytes are written over

    def tensors(self, layer: int, name: str) -> list[GgufTensorPlan]:
        """The file's tensors for a parameter of a layer, by the name within the layer.

        There are several where the file splits it.
        """
        skeleton = self.stream.skeleton
        return self._planned[skeleton.key(f"{skeleton.layer_name(layer)}.{name}")]

    def step(
        self,
        part: Part,
        linears: Mapping[str, QuantizedLinear],
        importance: Mapping[str, str] | None = None,
        routed: Mapping[str, Sequence[int]] | None = None,
    ) -> Future[Step]:
        """Write quantized tensors, by their names in the file, to their places there."""

        def write() -> Step:
            written = write_blocks(self.path, self.plan.file, linears, self._known)
            self._known = next(iter(written), self._known)
            reports = tuple(linear.report for linear in linears.values())
            measured = dict(importance or {}), dict(routed or {})
            return Step(part, tuple(written), reports, *measured)

        return self._later.submit(write)


class _Grids(_Parts):
    """Linears of the blocks on integer grids, which some of ggml's types hold exactly."""

    def __init__(
        self, run: Run, plan: GgufFilePlan, linears: LinearPlan, path: Path, later: Background
    ) -> None:
        stream = Stream(linears.skeleton, run.checkpoint, run.device)
        super().__init__(run, plan, path, stream, later)
        self._linears = linears

    @property
    def needs(self) -> Needs | None:
        return self._linears.settings.needs()

    def outside(self) -> Step:
        return Step("outside")

    def embedding(self) -> None:
        return None

    def block(
        self,
        index: int,
        block: nn.Module,
        calibration: CalibrationPass | None,
        tick: Callable[[], None],
    ) -> Future[Step]:
        result = quantize_linears(self._linears, index, block, calibration, tick)
        return self.step("block", dict(self._packed(index, result)))

    def output(self, calibration: CalibrationPass | None) -> Step:
        return Step("output")

    def _packed(self, layer: int, result: BlockResult) -> Iterator[tuple[str, QuantizedLinear]]:
        for module, linear in result.linears.items():
            assert isinstance(linear.tensor, QuantizedTensor)
            [tensor] = self.tensors(layer, f"{module}.weight")
            value = grids.pack_blocks(linear.tensor.cpu(), tensor.transform)
            report = _report(tensor, linear.report.error, linear.report.measured_on)
            report = replace(
                report, tokens=linear.report.tokens, all_tokens=linear.report.all_tokens
            )
            yield tensor.name, QuantizedLinear(value, report)
        for name, changed in result.changed.items():
            for tensor in self.tensors(layer, name):
                stored = tensor.transform.apply(changed.cpu())
                value = quantize_by_ggml(stored, tensor.type, threads=1)
                yield tensor.name, QuantizedLinear(value, _report(tensor, 0.0, "weights"))


class _Mix(_Parts):
    """Tensors of the types that a mix has for them."""

    def __init__(
        self, run: Run, plan: GgufFilePlan, method: MixMethod, path: Path, later: Background
    ) -> None:
        stream = Stream(Skeleton(run.checkpoint), run.checkpoint, run.device)
        super().__init__(run, plan, path, stream, later)
        self._method = method

    @property
    def needs(self) -> Needs:
        return self._method.needs()

    @property
    def _corrects(self) -> bool:
        return self.needs.propagate == "corrected"

    @cached_property
    def _output(self) -> GgufTensorPlan:
        return output_matrix(self.plan, self.stream)

    @property
    def _output_first(self) -> bool:
        # What quantizing the embedding does to the rows is corrected, so that a matrix which is
        # the embedding too must be quantized before the first block.
        return self._corrects and self._output.name == EMBEDDING

    def outside(self) -> Step:
        if not self._output_first:
            return Step("outside")
        return self._quantize_output("outside", measure_output(self.run, self.stream))

    def embedding(self) -> EmbeddingRows | None:
        if not self._corrects:
            return None
        return embedding_rows(self.run, self.plan, self.path, _tensors(self.run.journal.steps))

    def block(
        self,
        index: int,
        block: nn.Module,
        calibration: CalibrationPass | None,
        tick: Callable[[], None],
    ) -> Future[Step]:
        assert calibration is not None
        inputs: Iterable[list[InputStatistics]] = (
            ([group] for group in calibration.measure_in_turn(index, block, tick))
            if isinstance(calibration, CorrectedPass)
            else (part for _, part, _ in calibration.measure_in_parts(index, block, tick))
        )
        importance: dict[str, str] = {}
        routed: dict[str, Sequence[int]] = {}
        quantized: dict[str, QuantizedLinear] = {}
        for groups in inputs:
            matrices = {
                consumer: self._matrices(index, block, f"{consumer}.weight")
                for group in groups
                for consumer in group.consumers
            }
            groups = [_as_stored(group, matrices) for group in groups]
            for nth in range(max(map(len, matrices.values()), default=0)):
                some = {name: parts[nth] for name, parts in matrices.items() if nth < len(parts)}
                quantized |= self._method.quantize(_whole(groups, some), some)
            # Read from the device after all that it has to do.
            for group in groups:
                weights = _encode(group.importance())
                keys = {name: str(matrices[name][0].key) for name in group.consumers}
                importance |= dict.fromkeys(keys.values(), weights)
                counts = group.routed.items()
                routed |= {keys[name]: (count, group.tokens) for name, count in counts}
            if self._corrects:
                self._apply(block, matrices, quantized, groups[0].importance().cpu())
        return self.step("block", quantized, importance, routed)

    def _matrices(self, index: int, block: nn.Module, name: str) -> list[FileMatrix]:
        """What the file makes of a parameter."""
        return [
            FileMatrix.of_block(tensor, self._source, block, name)
            for tensor in self.tensors(index, name)
        ]

    def output(self, calibration: CalibrationPass | None) -> Step:
        if self._output_first or not self._method.measures_output:
            return Step("output")
        assert calibration is not None
        return self._quantize_output("output", calibration.output())

    def _quantize_output(self, part: Part, inputs: InputStatistics) -> Step:
        matrix = FileMatrix(self._output, self._source)
        tied = self._output.name == EMBEDDING
        return self.step(part, self._method.quantize_output(inputs, matrix, tied=tied)).result()

    def _apply(
        self,
        block: nn.Module,
        matrices: Mapping[str, Sequence[FileMatrix]],
        quantized: Mapping[str, QuantizedLinear],
        importance: Tensor,
    ) -> None:
        """Give the linears of ``block`` the weights that the file will hold."""
        for consumer, parts in matrices.items():
            device = block.get_parameter(f"{consumer}.weight").device
            values = []
            for matrix in parts:
                if matrix.name in quantized:
                    tensor = quantized[matrix.name].tensor
                    assert isinstance(tensor, GgmlTensor)
                else:
                    tensor = quantize_by_ggml(matrix.whole(), matrix.type, importance)
                # A GPU decodes at once what takes a CPU a while, and its bytes are few.
                fast = fused(device) and tensor.type in LAYOUTS
                value = decoded(tensor, device) if fast else tensor.dequantize()
                values.append(matrix.plan.transform.undo(value))
            # Each part of a parameter that the file splits has zeros where the others are.
            put(block, f"{consumer}.weight", reduce(torch.add, values))


def _whole(
    groups: Iterable[InputStatistics], matrices: Mapping[str, FileMatrix]
) -> list[InputStatistics]:
    """The inputs of those matrices that have two dimensions in the file; ggml quantizes others."""
    fit = {name for name, matrix in matrices.items() if len(matrix.shape) == 2}
    return [
        replace(group, consumers=[name for name in group.consumers if name in fit])
        for group in groups
    ]


def _as_stored(
    group: InputStatistics, matrices: Mapping[str, Sequence[FileMatrix]]
) -> InputStatistics:
    """What matrices read, in the order in which the file has their columns."""
    plans = [matrices[name][0].plan for name in group.consumers]
    orders = [column_order(plan.transform, plan.shape[-1]) for plan in plans]
    if all(order is None for order in orders):
        return group
    [order] = orders  # of a linear whose input nothing else reads
    assert order is not None
    return group.reordered(order)


def _report(tensor: GgufTensorPlan, error: float, measured_on: str) -> LayerReport:
    return LayerReport(tensor.name, tensor.type, error, measured_on)


def _encode(values: Tensor) -> str:
    return base64.b64encode(values.float().cpu().numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)
