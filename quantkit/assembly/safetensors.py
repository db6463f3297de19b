"""Artifacts in safetensors: linears of the blocks are quantized, all else is copied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.assembly.blocks import assemble, quantize_linears
from quantkit.assembly.completeness import check_complete
from quantkit.assembly.journal import Step
from quantkit.assembly.run import Run
from quantkit.base.background import Background, so_far, to_host
from quantkit.base.errors import not_finite
from quantkit.base.files import write_json
from quantkit.base.parallel import parallel_map
from quantkit.calibration.needs import Needs
from quantkit.calibration.passing import CalibrationPass
from quantkit.checkpoint.sidecars import write_config
from quantkit.checkpoint.writer import TensorWriter
from quantkit.checkpoint.written import Written
from quantkit.formats.registry import safetensors_formats
from quantkit.methods.linears import BlockResult
from quantkit.model.stream import Stream
from quantkit.plan.linears import LinearPlan
from quantkit.results.manifest import LayerReport

_AT_ONCE = 1 << 25  # bytes of a tensor that is copied


def write_safetensors(run: Run, plan: LinearPlan) -> list[LayerReport]:
    """Write the planned artifact's weights and config into ``run.directory``."""
    format = safetensors_formats()[plan.format]
    stream = Stream(plan.skeleton, run.checkpoint, run.device)
    keys = [
        key
        for tensor in plan.tensors
        for key in (tensor.name, *(_part_key(tensor.name, s) for s in format.suffixes))
    ]
    with (
        TensorWriter(run.directory, keys, scratch=run.journal.scratch) as writer,
        Background(threaded=run.background) as later,
    ):
        assemble(run, stream, _Parts(run, plan, writer, later), f"quantize ({plan.method})")
    check_complete(plan, run.directory)
    write_config(run.directory, run.checkpoint.config, plan.quantization_config)
    for name, content in format.other_files(plan.quantization_config).items():
        write_json(run.directory / name, content)
    return [layer for step in run.journal.steps for layer in step.layers]


class _Parts:
    """Implements ``blocks.Parts``. ``later``: writes one part beside the work on the next."""

    def __init__(self, run: Run, plan: LinearPlan, writer: TensorWriter, later: Background) -> None:
        self._source, self._plan = plan.skeleton.viewed(run.checkpoint), plan
        self._writer, self._later = writer, later
        self._device = run.device
        self._format = safetensors_formats()[plan.format]
        # Layers may share a tensor, which is written with the first of them.
        self._planned = {tensor.name for tensor in plan.tensors}
        self._left = set(self._planned)

    @property
    def needs(self) -> Needs | None:
        return self._plan.settings.needs()

    def resume(self, steps: Sequence[Step]) -> bool:
        written = [tensor for step in steps for tensor in step.tensors]
        self._left -= {tensor.name for tensor in written}
        return self._writer.resume(written)

    def restart(self) -> None:
        self._left = set(self._planned)
        self._writer.restart()

    def outside(self) -> Future[Step]:
        def copy() -> Step:
            return Step("outside", tuple(self._copy(key) for key in self._plan.outside))

        return self._later.submit(copy)

    def embedding(self) -> None:
        return None

    def block(
        self,
        index: int,
        block: nn.Module,
        calibration: CalibrationPass | None,
        tick: Callable[[], None],
    ) -> Future[Step]:
        result = quantize_linears(self._plan, index, block, calibration, tick)
        prefix = self._plan.skeleton.layer_name(index) + "."
        layers = tuple(linear.report for linear in result.linears.values())
        keys = tuple(self._plan.skeleton.key(prefix + name) for name in result.changed)
        devices: set[torch.device] = set()  # several, where linears were solved apart
        packed = self._pack(prefix, result, devices)
        changed = {name: to_host(value) for name, value in result.changed.items()}
        devices |= {value.device for value in result.changed.values()}
        ready = [so_far(device) for device in devices]

        def write() -> Step:
            for wait in ready:
                wait()
            written = tuple(self._write(prefix, packed, changed))
            return Step("block", written, layers, rescaled=keys)

        return self._later.submit(write)

    def output(self, calibration: CalibrationPass | None) -> Step:
        return Step("output")

    def _pack(
        self, prefix: str, result: BlockResult, devices: set[torch.device]
    ) -> dict[str, dict[str, Tensor]]:
        """The tensors that each quantized weight is stored as, on their way to the host.

        Packed where the codes are: a device packs faster, and less is copied then. devices: gets
        those that the copies come from.
        """
        skeleton = self._plan.skeleton
        names = {f"{module}.weight": module for module in result.linears}
        names = {name: module for name, module in names.items() if prefix + name in skeleton.names}

        def pack(name: str) -> dict[str, Tensor]:
            # Codes that are packed aren't kept beside their words.
            tensor, key = result.linears.pop(names[name]).tensor, skeleton.names[prefix + name]
            parts = self._format.pack(tensor, skeleton.model.dtype)
            devices.update(part.device for part in parts.values())
            return {_part_key(key, suffix): to_host(part) for suffix, part in parts.items()}

        return dict(zip(names, parallel_map(pack, names, self._device), strict=True))

    def _write(
        self, prefix: str, packed: dict[str, dict[str, Tensor]], changed: Mapping[str, Tensor]
    ) -> Iterator[Written]:
        """Write one block: what was quantized, what was rescaled, and copies of the rest."""
        skeleton = self._plan.skeleton
        views = skeleton.views
        names = {
            name.removeprefix(prefix): key
            for name, key in skeleton.names.items()
            if name.startswith(prefix)
        }
        for name, key in names.items():
            if name in packed:
                yield from self._writer.add(packed.pop(name))
            elif name in changed:
                yield from self._writer.add({key: changed[name]})
            else:
                stored = views[key].key if key in views and key not in self._planned else key
                if stored in self._left:
                    yield self._copy(stored)

    def _copy(self, key: str) -> Written:
        """Write a tensor that is kept. Raises InputError if it holds NaN or infinity."""
        self._left.discard(key)
        dtype, shape = self._source.dtype(key), self._source.shape(key)
        return self._writer.add_parts(key, dtype, shape, _finite_parts(self._source, key))


def _part_key(key: str, suffix: str) -> str:
    """The key of one of the tensors that are stored for the weight ``key``."""
    return f"{key.removesuffix('.weight')}.{suffix}"


def _finite_parts(checkpoint: Any, key: str) -> Iterator[Tensor]:
    dtype, shape = checkpoint.dtype(key), checkpoint.shape(key)
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
