"""One GGUF file: what the calibration rows tell first, where there are some, then the tensors."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.assembly.grids import write_grids
from quantkit.assembly.run import Run
from quantkit.calibration.passing import Wanted
from quantkit.calibration.statistics import InputStatistics
from quantkit.checkpoint.journal import Step
from quantkit.formats.gguf_file import GgufTensorPlan
from quantkit.formats.gguf_writer import Made, WrittenTensor, intact, write_blocks, write_file
from quantkit.model.skeleton import Skeleton
from quantkit.model.stream import Stream
from quantkit.parallel import spread
from quantkit.plan import GgufFilePlan
from quantkit.quantizers import ggml_feedback
from quantkit.quantizers.block import LayerReport
from quantkit.quantizers.ggml import GgmlTensor
from quantkit.quantizers.grid import gram_loss, total
from quantkit.recipe import Awq, Ggml, Gptq, GptqGguf, Rtn

# Rows of a matrix that is the embedding too are also read one by one: damping is what keeps
# them close to what they were (docs/quality.md).
_TIED_DAMPING = 0.1
_ROWS = 4096  # of the output matrix, that one thread quantizes
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
    wanted = count + (feedback is not None)  # the output matrix comes last
    if len(steps) < wanted:
        stream = Stream(skeleton, run.checkpoint, run.device)
        label = "importance weights" if feedback is None else f"quantize (gptq, {method.mix})"
        with (
            run.calibration(stream, Wanted("gram" if feedback else "diagonal")) as calibration,
            run.progress.task(label, wanted) as task,
        ):
            assert calibration is not None
            if steps and not calibration.restore(steps[-1]["calibration"]):
                run.journal.forget()
                steps = []
            task.advance(len(steps))
            for index in range(len(steps), count):
                with stream.block(index) as block:
                    inputs, _ = calibration.through(index, block)
                    keys = _keys(skeleton, index, inputs)
                    step: Step = {"importance": _importance(inputs, keys)}
                    if feedback is not None:
                        known = next(iter(_finished(run)), None)
                        found = _feedback(run, plan, inputs, keys, feedback)
                        written = write_blocks(path, plan.file, found, known)
                        step["tensors"] = [asdict(tensor) for tensor in written]
                step["calibration"] = calibration.state()
                run.journal.record(step)
                steps.append(step)
                task.advance(doing=f"layer {index + 1} of {count}")
            if feedback is not None and len(steps) == count:
                known = next(iter(_finished(run)), None)
                found = _output(run, plan, stream, calibration.output(), feedback)
                written = write_blocks(path, plan.file, found, known)
                steps.append({"importance": {}, "tensors": [asdict(t) for t in written]})
                run.journal.record({**steps[-1], "calibration": calibration.state()})
                task.advance(doing="output matrix")
    return {key: _decode(text) for step in steps for key, text in step["importance"].items()}


def _keys(skeleton: Skeleton, index: int, inputs: Sequence[InputStatistics]) -> dict[str, str]:
    """Checkpoint keys of the weights of a layer's linears, by the linear's name within it."""
    prefix = skeleton.layer_name(index)
    return {
        consumer: skeleton.key(f"{prefix}.{consumer}.weight")
        for group in inputs
        for consumer in group.consumers
    }


def _importance(inputs: Sequence[InputStatistics], keys: dict[str, str]) -> dict[str, str]:
    return {
        keys[consumer]: _encode(group.importance())
        for group in inputs
        for consumer in group.consumers
    }


def _feedback(
    run: Run,
    plan: GgufFilePlan,
    inputs: Sequence[InputStatistics],
    keys: dict[str, str],
    method: GptqGguf,
) -> list[Made]:
    """The linears of one layer by error feedback, each with its relative output error.

    What gets none is left out: types whose codes are not chosen one at a time, inputs whose
    Gram matrix can't be factorized.
    """
    planned = {tensor.key: tensor for tensor in plan.file.tensors}
    groups = sorted(inputs, key=lambda group: -group.width)

    def factorize(group: InputStatistics) -> ggml_feedback.Factor | None:
        if group.width % ggml_feedback.WIDTH:
            return None
        return ggml_feedback.factorize(group.moment, method.damp_percent)

    factors = spread(factorize, groups, torch.device("cpu"))
    todo = [
        (planned[keys[consumer]], factor, group.energy[consumer])
        for group, factor in zip(groups, factors, strict=True)
        for consumer in group.consumers
        if factor is not None and planned[keys[consumer]].type in ggml_feedback.TYPES
    ]

    def quantize(
        item: tuple[GgufTensorPlan, ggml_feedback.Factor, Any],
    ) -> Made:
        tensor, factor, energy = item
        outcome = ggml_feedback.quantize(tensor.value(run.checkpoint).float(), factor, tensor.type)
        error = outcome.loss / max(float(energy), 1e-30)
        return Made(tensor, outcome.tensor, error, "outputs")

    return spread(quantize, todo, torch.device("cpu"))


def _output(
    run: Run, plan: GgufFilePlan, stream: Stream, inputs: InputStatistics, method: GptqGguf
) -> list[Made]:
    """The matrix of the output by error feedback, where that can be; the embedding's, if tied."""
    [tensor] = [tensor for tensor in plan.file.tensors if tensor.key == stream.output_key]
    if tensor.type not in ggml_feedback.TYPES or inputs.width % ggml_feedback.WIDTH:
        return []
    tied = tensor.name == "token_embd.weight"
    damping = max(method.damp_percent, _TIED_DAMPING) if tied else method.damp_percent
    factor = ggml_feedback.factorize(inputs.moment, damping)
    if factor is None:
        return []
    value = tensor.value(run.checkpoint)

    def quantize(rows: Tensor) -> ggml_feedback.Outcome:
        return ggml_feedback.quantize(rows, factor, tensor.type)

    parts = spread(quantize, value.split(_ROWS), torch.device("cpu"))
    gram = inputs.moment.matrix().cpu()
    energy = total(gram_loss(value[::_SAMPLED].float(), gram)) * _SAMPLED
    blocks = torch.cat([part.tensor.blocks for part in parts])
    error = math.fsum(part.loss for part in parts) / max(energy, 1e-30)
    quantized = GgmlTensor(tensor.type, blocks, tuple(value.shape))
    return [Made(tensor, quantized, error, "outputs")]


def _encode(values: Tensor) -> str:
    return base64.b64encode(values.float().cpu().numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)
