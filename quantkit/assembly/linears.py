"""Artifacts in safetensors: quantized and written a block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor, nn

from quantkit.assembly.run import Run
from quantkit.base.errors import not_finite
from quantkit.base.files import write_json
from quantkit.base.parallel import spread
from quantkit.calibration.passing import CalibrationPass, Wanted
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.sidecars import write_config
from quantkit.checkpoint.writer import TensorWriter, Written
from quantkit.formats import packed
from quantkit.formats.registry import safetensors_formats
from quantkit.methods.block import BlockResult, LayerReport, quantize_block
from quantkit.model.stream import Stream
from quantkit.plan.linears import LinearPlan
from quantkit.recipes.recipe import Awq, Gptq, SmoothQuant

_AT_ONCE = 1 << 25  # bytes of a tensor that is copied


def write_linears(run: Run, plan: LinearPlan) -> list[LayerReport]:
    """Write the planned artifact's weights and config into ``run.directory``."""
    skeleton = plan.skeleton
    stream = Stream(skeleton, run.checkpoint, run.device)
    count = len(skeleton.layers)
    keys = [key for t in plan.tensors for key in (t.name, *packed.packed_keys(plan.format, t.name))]
    with (
        run.calibration(stream, wanted(plan)) as calibration,
        TensorWriter(run.directory, keys, scratch=run.journal.scratch) as writer,
        run.progress.task(
            f"quantize ({plan.method})", count * (1 + (calibration.steps if calibration else 0))
        ) as task,
    ):
        layers, first = _resume(run, writer, calibration)
        task.advance(first * (1 + (calibration.steps if calibration else 0)))
        if not run.journal.steps:
            outside = [_copy(writer, run.checkpoint, key) for key in plan.outside]
            run.journal.record(_step(outside, [], calibration))
        for index in range(first, count):
            doing = f"layer {index + 1} of {count}"
            step = partial(task.advance, doing=f"{doing}, calibrating")
            prefix = skeleton.layer_name(index) + "."
            with stream.block(index) as block:
                result = quantize_layer(plan, index, block, calibration, step)
                written = _write_block(run.checkpoint, plan, prefix, result, writer)
            run.journal.record(_step(written, result.layers, calibration))
            layers += result.layers
            del result  # its codes would lie beside the next block's
            task.advance(doing=doing)
    write_config(run.directory, run.checkpoint.config, plan.quantization_config)
    other_files = safetensors_formats()[plan.format].other_files(plan.quantization_config)
    for name, content in other_files.items():
        write_json(run.directory / name, content)
    return layers


def wanted(plan: LinearPlan) -> Wanted:
    """What the plan's method needs to know of the inputs."""
    method = plan.settings
    if isinstance(method, SmoothQuant):
        return Wanted("diagonal", folds=True)
    propagate = method.propagate if isinstance(method, Gptq | Awq) else "original"
    return Wanted("gram", folds=isinstance(method, Awq), propagate=propagate)


def quantize_layer(
    plan: LinearPlan,
    index: int,
    block: nn.Module,
    calibration: CalibrationPass | None,
    step: Callable[[], None],
) -> BlockResult:
    """Quantize layer ``index``, in memory as ``block``, and let the rows go on through it."""
    prefix = plan.skeleton.layer_name(index) + "."
    schemes = plan.schemes_under(prefix)
    quantize = partial(quantize_block, plan.settings, block, prefix=prefix)
    if calibration is None:
        return quantize(schemes, [], [])
    if calibration.wanted.propagate != "corrected":
        result = quantize(schemes, *calibration.through(index, block, step))
        if not calibration.wanted.onward:
            _become(block, result)
            calibration.carry(index, block, step)
        return result
    result, left = BlockResult(), dict(schemes)
    for group in calibration.corrected(index, block, step):
        readers = {name: left.pop(name) for name in group.consumers if name in left}
        if readers:
            found = quantize(readers, [group], [])
            _become(block, found)
            result.tensors |= found.tensors
            result.layers += found.layers
    if left:  # which no row ever reached: it is said in the same words
        quantize(left, [], [])
    return result


def _step(
    written: list[Written], layers: list[LayerReport], calibration: CalibrationPass | None
) -> dict[str, object]:
    """What the journal says of a block: where its bytes are, and what the next one starts from."""
    return {
        "tensors": [asdict(tensor) for tensor in written],
        "layers": [asdict(layer) for layer in layers],
        "calibration": calibration.state() if calibration else None,
    }


def _resume(
    run: Run, writer: TensorWriter, calibration: CalibrationPass | None
) -> tuple[list[LayerReport], int]:
    """The layers that an earlier run has quantized, and the number of blocks."""
    steps = run.journal.steps
    if not steps:
        return [], 0
    blocks = len(steps) - 1  # before them, what lies outside
    written = [Written(**tensor) for step in steps for tensor in step["tensors"]]
    state = steps[-1]["calibration"]
    if not writer.resume(written) or (
        blocks and calibration is not None and not calibration.restore(state)
    ):
        run.progress.note("the unfinished work is damaged: starting again")
        run.journal.forget()
        writer.restart()
        return [], 0
    return [LayerReport(**layer) for step in steps for layer in step["layers"]], blocks


def _write_block(
    checkpoint: Checkpoint, plan: LinearPlan, prefix: str, result: BlockResult, writer: TensorWriter
) -> list[Written]:
    """Write one block: what was quantized, what was rescaled, and the rest as it was."""
    names = {
        name.removeprefix(prefix): key
        for name, key in plan.skeleton.names.items()
        if name.startswith(prefix)
    }
    quantized = {
        f"{module}.weight": tensor
        for module, tensor in result.tensors.items()
        if f"{module}.weight" in names
    }

    def pack(name: str) -> dict[str, Tensor]:
        return packed.pack(plan.format, names[name], quantized[name], plan.skeleton.model.dtype)

    parts = dict(zip(quantized, spread(pack, quantized, torch.device("cpu")), strict=True))
    written = []
    for name, key in names.items():
        if name in parts:
            written += writer.add(parts.pop(name))
        elif name in result.changed:
            written += writer.add({key: result.changed[name]})
        else:
            written.append(_copy(writer, checkpoint, key))
    return written


def _become(block: nn.Module, result: BlockResult) -> None:
    """Give ``block`` the weights that were written, for the rows to go on through."""
    for name, value in result.changed.items():
        put(block, name, value)
    for name, tensor in result.tensors.items():  # one at a time: they are float32 first
        put(block, f"{name}.weight", tensor.dequantize())


def put(block: nn.Module, name: str, value: Tensor) -> None:
    """Give the parameter ``name`` of ``block`` another value, in its own dtype and place."""
    parameter = block.get_parameter(name)
    parameter.data = value.to(parameter.device, parameter.dtype)


def _copy(writer: TensorWriter, checkpoint: Checkpoint, key: str) -> Written:
    """Write a tensor that is kept as it is. Raises InputError if it holds NaN or infinity."""
    dtype, shape = checkpoint.dtype(key), checkpoint.shape(key)
    return writer.add_parts(key, dtype, shape, _finite_parts(checkpoint, key, shape, dtype))


def _finite_parts(
    checkpoint: Checkpoint, key: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Iterator[Tensor]:
    height = shape[0] if shape else 0
    row = torch.Size(shape[1:]).numel() * dtype.itemsize
    step = max(1, _AT_ONCE // max(1, row))
    parts = (
        (checkpoint.read_rows(key, first, first + step) for first in range(0, height, step))
        if shape
        else iter([checkpoint.read(key)])
    )
    for part in parts:
        if part.is_floating_point() and not bool(part.isfinite().all()):
            raise not_finite(key)
        yield part
