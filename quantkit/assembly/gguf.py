"""One GGUF file: what the calibration rows tell first, where there are some, then the tensors."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.assembly.gguf_feedback import (
    EMBEDDING,
    embedding_rows,
    output_matrix,
    quantize_output,
    quantize_readers,
)
from quantkit.assembly.grids import write_grids
from quantkit.assembly.linears import put
from quantkit.assembly.run import Run
from quantkit.calibration.activations import HiddenStates
from quantkit.calibration.passing import CalibrationPass, Wanted
from quantkit.calibration.statistics import InputStatistics
from quantkit.checkpoint.journal import Step
from quantkit.formats.gguf.writer import Made, WrittenTensor, intact, write_blocks, write_file
from quantkit.methods.block import LayerReport
from quantkit.methods.ggml import types as ggml
from quantkit.model.skeleton import Skeleton
from quantkit.model.stream import Stream
from quantkit.plan.linears import GgufFilePlan
from quantkit.recipes.recipe import Awq, Ggml, Gptq, GptqGguf, Rtn


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
    corrected = wanted.propagate == "corrected"
    stream = Stream(skeleton, run.checkpoint, run.device)
    # What becomes of the embedding is made up for: it must be known before the first block.
    early = corrected and output_matrix(plan, stream).name == EMBEDDING
    parts = count + (feedback is not None)  # with the output matrix

    def record(step: Step, made: Iterable[Made], state: dict[str, Any] | None) -> None:
        if feedback is not None:
            written = write_blocks(path, plan.file, made, next(iter(_finished(run)), None))
            step["tensors"] = [asdict(tensor) for tensor in written]
        step["calibration"] = state
        run.journal.record(step)
        steps.append(step)

    if len(steps) == parts:
        return _importances(steps)
    with run.progress.task(label, parts) as task:
        task.advance(len(steps))
        if early and not steps:
            assert feedback is not None
            inputs = _as_it_was(run, stream, partial(task.advance, 0))
            record({"importance": {}}, quantize_output(run, plan, stream, inputs, feedback), None)
            task.advance(doing="output matrix")
        embedding = embedding_rows(run, plan, path, _finished(run)) if corrected else None
        with run.calibration(stream, wanted, embedding) as calibration:
            assert calibration is not None
            if len(steps) > early and not calibration.restore(steps[-1]["calibration"]):
                run.journal.forget()
                del steps[int(early) :]
                for step in steps:
                    run.journal.record(step)
            for index in range(len(steps) - early, count):
                with stream.block(index) as block:
                    step, made = _layer(run, plan, index, block, calibration, feedback)
                record(step, made, calibration.state())
                task.advance(doing=f"layer {index + 1} of {count}")
            if feedback is not None and not early:
                made = quantize_output(run, plan, stream, calibration.output(), feedback)
                record({"importance": {}}, made, calibration.state())
                task.advance(doing="output matrix")
    return _importances(steps)


def _importances(steps: Iterable[Step]) -> dict[str, Tensor]:
    return {key: _decode(text) for step in steps for key, text in step["importance"].items()}


def _as_it_was(run: Run, stream: Stream, step: Callable[..., None]) -> InputStatistics:
    """What the output matrix reads of the unquantized model."""
    assert run.rows is not None
    hidden = HiddenStates(run.journal.scratch, run.budget, "before")
    calibration = CalibrationPass(stream, run.rows, Wanted("gram"), hidden=hidden)
    count = len(stream.skeleton.layers)
    for index in range(count):
        with stream.block(index) as block:
            calibration.carry(index, block, lambda: None)
        step(doing=f"layer {index + 1} of {count}, as it was")
    return calibration.output()


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
            made += quantize_readers(run, groups, readers, feedback)
        if corrected:
            values = {tensor.plan.name: tensor.value for tensor in made}
            for consumer, tensor in readers.items():
                value = values.get(tensor.name) or ggml.quantize(
                    tensor.value(run.checkpoint), tensor.type, groups[0].importance().cpu()
                )
                put(block, f"{consumer}.weight", tensor.transform.undo(value.dequantize()))
    return {"importance": importance}, made


def _encode(values: Tensor) -> str:
    return base64.b64encode(values.float().cpu().numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)
