"""The linears of a GGUF file's blocks on integer grids, a block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from quantkit.assembly.linears import quantize_layer, wanted
from quantkit.assembly.run import Run
from quantkit.formats.gguf import grids as gguf_grids
from quantkit.formats.gguf.writer import Made, WrittenTensor, write_blocks
from quantkit.methods.block import BlockResult
from quantkit.methods.ggml import types as ggml
from quantkit.methods.grids import QuantizedTensor
from quantkit.model.stream import Stream
from quantkit.plan.linears import GgufFilePlan, LinearPlan


def write_grids(run: Run, plan: GgufFilePlan, linears: LinearPlan, path: Path) -> None:
    """Quantize the linears of every block and write them, with what was rescaled for them."""
    skeleton = linears.skeleton
    steps = [step for step in run.journal.steps if "layer" in step]
    count = len(skeleton.layers)
    if len(steps) == count:
        return
    stream = Stream(skeleton, run.checkpoint, run.device)
    with (
        run.calibration(stream, wanted(linears)) as calibration,
        run.progress.task(f"quantize ({plan.method})", count) as task,
    ):
        if steps and calibration and not calibration.restore(steps[-1]["calibration"]):
            run.journal.forget()
            steps = []
        task.advance(len(steps))
        known = WrittenTensor(**steps[0]["tensors"][0]) if steps else None
        for index in range(len(steps), count):
            prefix = skeleton.layer_name(index) + "."
            step = partial(task.advance, 0, doing=f"layer {index + 1} of {count}, calibrating")
            with stream.block(index) as block:
                result = quantize_layer(linears, index, block, calibration, step)
                written = write_blocks(path, plan.file, _made(plan, linears, prefix, result), known)
                known = known or written[0]
            run.journal.record(
                {
                    "layer": index,
                    "tensors": [asdict(tensor) for tensor in written],
                    "calibration": calibration.state() if calibration else None,
                }
            )
            task.advance(doing=f"layer {index + 1} of {count}")


def _made(
    plan: GgufFilePlan, linears: LinearPlan, prefix: str, result: BlockResult
) -> Iterator[Made]:
    planned = {tensor.key: tensor for tensor in plan.file.tensors}
    reports = {report.name: report for report in result.layers}
    for module, tensor in result.tensors.items():
        assert isinstance(tensor, QuantizedTensor)
        place = planned[linears.skeleton.key(f"{prefix}{module}.weight")]
        report = reports[f"{prefix}{module}"]
        value = gguf_grids.pack(tensor.cpu(), place.transform)
        yield Made(place, value, report.error, report.measured_on)
    for name, changed in result.changed.items():
        place = planned[linears.skeleton.key(f"{prefix}{name}")]
        value = ggml.quantize(place.transform.apply(changed.cpu()), place.type, threads=1)
        yield Made(place, value, 0.0, "weights")
