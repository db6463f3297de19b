"""One GGUF file: what the calibration rows tell first, where there are some, then the tensors."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from quantkit.assembly.grids import write_grids
from quantkit.assembly.linears import put
from quantkit.assembly.run import Run
from quantkit.calibration.passing import CalibrationPass, Wanted
from quantkit.calibration.statistics import InputStatistics
from quantkit.checkpoint.journal import Step
from quantkit.errors import InputError
from quantkit.formats.gguf_file import GgufTensorPlan
from quantkit.formats.gguf_writer import Made, WrittenTensor, intact, write_blocks, write_file
from quantkit.model.skeleton import Skeleton
from quantkit.model.stream import Stream
from quantkit.parallel import spread
from quantkit.plan import GgufFilePlan
from quantkit.quantizers import ggml, ggml_feedback
from quantkit.quantizers.block import LayerReport
from quantkit.quantizers.ggml import GgmlTensor
from quantkit.quantizers.grid import gram_loss, total
from quantkit.recipe import Awq, Ggml, Gptq, GptqGguf, Rtn

# Rows of a matrix that is the embedding too are also read one by one: damping is what keeps
# them close to what they were (docs/quality.md).
_TIED_DAMPING = 0.1
_ROWS = 2048  # that one thread quantizes at a time
_SAMPLED = 8  # one in so many of them is looked at for the size of the outputs


def write_gguf(
    run: Run, plan: GgufFilePlan, name: str, method: Ggml | GptqGguf | Rtn | Gptq | Awq
) -> list[LayerReport]:
    """Write the planned file into ``run.directory``; ``name``: the model's.

    With gptq the linears of the blocks are quantized as the rows pass, those whose type has
    codes that can be chosen one at a time; with integer grids all of them are, as they are in
    safetensors. All other tensors are ggml's, with importance weights where there are rows.
    """
    path = run.directory / f"{name}-{plan.file.mix.upper()}.gguf"
    finished = _finished(run)
    if finished and not intact(path, finished):
        run.progress.note("the unfinished work is damaged: starting again")
        run.journal.forget()
    importance: dict[str, Tensor] = {}
    if plan.linears is not None:
        write_grids(run, plan, plan.linears, path)
    elif isinstance(method, Ggml | GptqGguf) and run.rows is not None:
        importance = _calibrate(run, plan, path, method)
    with run.progress.task(f"quantize ({plan.file.mix})", len(plan.file.tensors)) as task:
        written = write_file(
            path,
            plan.file,
            run.checkpoint,
            importance.get,
            finished=_finished(run),
            record=lambda tensor: run.journal.record({"tensors": [asdict(tensor)]}),
            progress=task,
        )
    return [LayerReport(t.name, t.type, t.error, t.measured_on, t.weighted_error) for t in written]


def _finished(run: Run) -> list[WrittenTensor]:
    return [WrittenTensor(**t) for step in run.journal.steps for t in step.get("tensors", ())]


def _calibrate(
    run: Run, plan: GgufFilePlan, path: Path, method: Ggml | GptqGguf
) -> dict[str, Tensor]:
    """Mean square of each input feature, by the checkpoint key of the weight that reads it."""
    steps = [step for step in run.journal.steps if "importance" in step]
    skeleton = Skeleton(run.checkpoint)
    count = len(skeleton.layers)
    feedback = method if isinstance(method, GptqGguf) else None
    label = "importance weights" if feedback is None else f"quantize (gptq, {method.mix})"
    wanted = Wanted("gram", propagate=feedback.propagate) if feedback else Wanted("diagonal")
    parts = count + (feedback is not None)  # the output matrix comes last
    if len(steps) < parts:
        stream = Stream(skeleton, run.checkpoint, run.device)
        with (
            run.calibration(stream, wanted) as calibration,
            run.progress.task(label, parts) as task,
        ):
            assert calibration is not None
            if steps and not calibration.restore(steps[-1]["calibration"]):
                run.journal.forget()
                steps = []
            task.advance(len(steps))
            for index in range(len(steps), count):
                with stream.block(index) as block:
                    step, made = _layer(run, plan, index, block, calibration, feedback)
                if feedback is not None:
                    known = next(iter(_finished(run)), None)
                    written = write_blocks(path, plan.file, made, known)
                    step["tensors"] = [asdict(tensor) for tensor in written]
                step["calibration"] = calibration.state()
                run.journal.record(step)
                steps.append(step)
                task.advance(doing=f"layer {index + 1} of {count}")
            if feedback is not None and len(steps) == count:
                known = next(iter(_finished(run)), None)
                made = _output(run, plan, stream, calibration.output(), feedback)
                written = write_blocks(path, plan.file, made, known)
                steps.append({"importance": {}, "tensors": [asdict(t) for t in written]})
                run.journal.record({**steps[-1], "calibration": calibration.state()})
                task.advance(doing="output matrix")
    return {key: _decode(text) for step in steps for key, text in step["importance"].items()}


def _layer(
    run: Run,
    plan: GgufFilePlan,
    index: int,
    block: nn.Module,
    calibration: CalibrationPass,
    feedback: GptqGguf | None,
) -> tuple[Step, list[Made]]:
    """Measure layer ``index``, in memory as ``block``; what error feedback made of it, if any."""
    skeleton = calibration.stream.skeleton
    corrected = calibration.wanted.propagate == "corrected"
    inputs: Iterable[list[InputStatistics]] = (
        ([group] for group in calibration.corrected(index, block, lambda: None))
        if corrected
        else [calibration.through(index, block)[0]]
    )
    planned = {tensor.key: tensor for tensor in plan.file.tensors}
    importance: dict[str, str] = {}
    made: list[Made] = []
    for groups in inputs:
        readers = {
            consumer: planned[skeleton.key(f"{skeleton.layer_name(index)}.{consumer}.weight")]
            for group in groups
            for consumer in group.consumers
        }
        for group in groups:
            weights = _encode(group.importance())
            importance |= {str(readers[consumer].key): weights for consumer in group.consumers}
        if feedback is not None:
            made += _feedback(run, groups, readers, feedback)
        if corrected:
            values = {tensor.plan.name: tensor.value for tensor in made}
            for consumer, tensor in readers.items():
                value = values.get(tensor.name) or ggml.quantize(
                    tensor.value(run.checkpoint), tensor.type, groups[0].importance().cpu()
                )
                put(block, f"{consumer}.weight", tensor.transform.undo(value.dequantize()))
    return {"importance": importance}, made


def _feedback(
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


def _output(
    run: Run, plan: GgufFilePlan, stream: Stream, inputs: InputStatistics, method: GptqGguf
) -> list[Made]:
    """The matrix of the output by error feedback, where that can be; the embedding's, if tied."""
    # Where it is the embedding too and llama.cpp wants both, the embedding's comes first.
    *_, tensor = [tensor for tensor in plan.file.tensors if tensor.key == stream.output_key]
    if tensor.type not in ggml_feedback.TYPES or inputs.width % ggml_feedback.WIDTH:
        return []
    tied = tensor.name == "token_embd.weight"
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
            raise InputError(error.what, where=tensor.key, mend=error.mend) from error

    done = iter(spread(quantize, pieces, torch.device("cpu")))
    made = []
    for tensor, _, energy in todo:
        parts = [next(done) for _ in range(0, tensor.shape[0], _ROWS)]
        blocks = torch.cat([part.tensor.blocks for part in parts])
        error = math.fsum(part.loss for part in parts) / max(energy, 1e-30)
        made.append(Made(tensor, GgmlTensor(tensor.type, blocks, tensor.shape), error, "outputs"))
    return made


def _encode(values: Tensor) -> str:
    return base64.b64encode(values.float().cpu().numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)
