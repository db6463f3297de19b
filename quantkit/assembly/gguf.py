"""One GGUF file: importance weights first, where there are calibration rows, then the tensors."""

from __future__ import annotations

import base64
from dataclasses import asdict

import torch
from torch import Tensor

from quantkit.assembly.run import Run
from quantkit.calibration.passing import CalibrationPass, Wanted
from quantkit.formats.gguf_writer import WrittenTensor, intact, write_file
from quantkit.model.skeleton import Skeleton
from quantkit.model.stream import Stream
from quantkit.plan import GgufFilePlan
from quantkit.quantizers.block import LayerReport


def write_gguf(run: Run, plan: GgufFilePlan, name: str) -> list[LayerReport]:
    """Write the planned file into ``run.directory``; ``name``: the model's."""
    path = run.directory / f"{name}-{plan.file.mix.upper()}.gguf"
    finished = [WrittenTensor(**step["tensor"]) for step in run.journal.steps if "tensor" in step]
    if finished and not intact(path, finished):
        run.progress.note("the unfinished work is damaged: starting again")
        run.journal.forget()
        finished = []
    importance = {} if run.rows is None else _importance(run)
    with run.progress.task(f"quantize ({plan.file.mix})", len(plan.file.tensors)) as task:
        written = write_file(
            path,
            plan.file,
            run.checkpoint,
            importance.get,
            finished=finished,
            record=lambda tensor: run.journal.record({"tensor": asdict(tensor)}),
            progress=task,
        )
    return [
        LayerReport(tensor.name, tensor.type, tensor.error, "weights", tensor.weighted_error)
        for tensor in written
    ]


def _importance(run: Run) -> dict[str, Tensor]:
    """Mean square of each input feature, by the checkpoint key of the weight that reads it."""
    steps = [step for step in run.journal.steps if "importance" in step]
    skeleton = Skeleton(run.checkpoint)
    count = len(skeleton.layers)
    if len(steps) < count:
        stream = Stream(skeleton, run.checkpoint, run.device)
        with (
            run.calibration(stream, Wanted("diagonal")) as calibration,
            run.progress.task("importance weights", count) as task,
        ):
            assert calibration is not None
            if steps and not calibration.restore(steps[-1]["calibration"]):
                run.journal.forget()
                steps = []
            task.advance(len(steps))
            for index in range(len(steps), count):
                step = _measure(index, stream, calibration)
                run.journal.record(step)
                steps.append(step)
                task.advance(doing=f"layer {index + 1} of {count}")
    return {key: _decode(text) for step in steps for key, text in step["importance"].items()}


def _measure(index: int, stream: Stream, calibration: CalibrationPass) -> dict[str, object]:
    skeleton = stream.skeleton
    with stream.block(index) as block:
        inputs, _ = calibration.through(index, block)
    found = {
        skeleton.key(f"{skeleton.layer_name(index)}.{consumer}.weight"): _encode(group.importance())
        for group in inputs
        for consumer in group.consumers
    }
    return {"importance": found, "calibration": calibration.state()}


def _encode(values: Tensor) -> str:
    return base64.b64encode(values.float().cpu().numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)
