"""The one loop over a model's blocks, which continues where an earlier run was stopped.

An artifact is made in parts: what is outside the blocks, each block, and the output. Every kind of
artifact says what to do with a part; here the calibration rows are passed from block to block,
finished parts are recorded, and those of an earlier run are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Protocol

from torch import Tensor, nn

from quantkit.assembly.journal import Step
from quantkit.assembly.recording import Recording
from quantkit.assembly.run import EmbeddingRows, Run
from quantkit.calibration.corrected import CorrectedPass
from quantkit.calibration.needs import Needs
from quantkit.calibration.passing import CalibrationPass
from quantkit.methods.linears import BlockResult, Linears, Scheme
from quantkit.model.stream import Stream
from quantkit.plan.linears import LinearPlan


class Parts(Protocol):
    """What one kind of artifact makes of each part of a model."""

    @property
    def needs(self) -> Needs | None:
        """What must be measured as the calibration rows pass; None for nothing."""
        ...

    def resume(self, steps: Sequence[Step]) -> bool:
        """Continue after the steps of an earlier run; False where what they wrote is damaged."""
        ...

    def restart(self) -> None:
        """Forget what ``resume`` was given."""
        ...

    def outside(self) -> Step | Future[Step]:
        """What comes before the blocks."""
        ...

    def embedding(self) -> EmbeddingRows | None:
        """The embedding as it is quantized, where rows are to pass through that as well."""
        ...

    def block(
        self,
        index: int,
        block: nn.Module,
        calibration: CalibrationPass | None,
        tick: Callable[[], None],
    ) -> Step | Future[Step]:
        """Layer ``index``, in memory as ``block``; lets the rows pass, and ticks as they do.

        What was made of it may still be being written.
        """
        ...

    def output(self, calibration: CalibrationPass | None) -> Step:
        """What comes after the blocks."""
        ...


class _Damaged(Exception):
    """What an earlier run wrote is damaged."""


def assemble(run: Run, stream: Stream, parts: Parts, label: str) -> None:
    """Make all parts that the journal doesn't list yet. ``label``: names the work to people."""
    try:
        _assemble(run, stream, parts, label)
    except _Damaged:
        run.progress.note("the unfinished work is damaged: starting again")
        run.journal.forget()
        parts.restart()
        _assemble(run, stream, parts, label)


def _assemble(run: Run, stream: Stream, parts: Parts, label: str) -> None:
    if run.journal.steps and not parts.resume(run.journal.steps):
        raise _Damaged
    recording = Recording(run.journal)
    if not run.journal.steps:
        recording.add(parts.outside())
    count = len(stream.skeleton.layers)
    done = sum(step.part == "block" for step in run.journal.steps)
    if any(step.part == "output" for step in run.journal.steps):
        return
    with run.calibration(stream, parts.needs, parts.embedding()) as calibration:
        if done and calibration is not None and not _restored(calibration, run.journal.steps[-1]):
            raise _Damaged
        ticks = 1 + (calibration.steps if calibration is not None else 0)
        with run.progress.task(label, count * ticks) as task:
            task.advance(done * ticks)

            def tick(doing: str) -> None:
                recording.poll()
                task.advance(doing=doing)

            for index in range(done, count):
                doing = f"layer {index + 1} of {count}"
                with stream.block(index) as block:
                    ticking = partial(tick, f"{doing}, calibrating")
                    step = parts.block(index, block, calibration, ticking)
                recording.add(step, calibration)
                task.advance(doing=doing)
            recording.finish(parts.output(calibration))


def _restored(calibration: CalibrationPass, step: Step) -> bool:
    return step.calibration is not None and calibration.restore(step.calibration)


def quantize_linears(
    plan: LinearPlan,
    index: int,
    block: nn.Module,
    calibration: CalibrationPass | None,
    tick: Callable[[], None],
) -> BlockResult:
    """Quantize the linears of layer ``index``, in memory as ``block``, and let the rows pass.

    Raises InputError for a weight that isn't finite and for a linear that no row reached.
    """
    prefix = plan.skeleton.layer_name(index) + "."
    schemes, method = plan.schemes_under(prefix), plan.settings
    if calibration is None:
        # A recipe may ignore all linears of a layer.
        linears = Linears.of(block, schemes, prefix=prefix)
        return method.quantize(linears) if schemes else BlockResult()
    if isinstance(calibration, CorrectedPass):
        return _corrected(plan, index, block, calibration, tick)
    result = BlockResult()
    for names, inputs, folds in calibration.measure_in_parts(index, block, tick):
        folds = [fold for fold in folds if plan.may_rescale(prefix, fold)]
        some = {name: scheme for name, scheme in schemes.items() if name in names}
        if some:
            part = method.quantize(Linears.of(block, some, inputs, folds, prefix))
            result.linears |= part.linears
            result.changed |= part.changed
    if not calibration.needs.independent:
        _apply(block, result)
        calibration.carry(index, block, tick)
    return result


def _corrected(
    plan: LinearPlan,
    index: int,
    block: nn.Module,
    calibration: CorrectedPass,
    tick: Callable[[], None],
) -> BlockResult:
    """The same where each input is measured after all that was quantized before it."""
    prefix = plan.skeleton.layer_name(index) + "."
    left: dict[str, Scheme] = dict(plan.schemes_under(prefix))
    result = BlockResult()
    for group in calibration.measure_in_turn(index, block, tick):
        schemes: Mapping[str, Scheme] = {
            name: left.pop(name) for name in group.consumers if name in left
        }
        if schemes:
            linears = Linears.of(block, schemes, [group], prefix=prefix)
            quantized = plan.settings.quantize(linears)
            _apply(block, quantized)
            result.linears |= quantized.linears
    if left:
        Linears.of(block, left, prefix=prefix).require_inputs()
    return result


def _apply(block: nn.Module, result: BlockResult) -> None:
    """Give ``block`` the weights that were written, for the rows to pass through."""
    for name, value in result.changed.items():
        put(block, name, value)
    # One at a time, since each is float32 before it gets the block's dtype.
    for name, linear in result.linears.items():
        put(block, f"{name}.weight", linear.tensor.dequantize())


def put(block: nn.Module, name: str, value: Tensor) -> None:
    """Give the parameter ``name`` of ``block`` another value, kept in its dtype."""
    parameter = block.get_parameter(name)
    parameter.data = value.to(parameter.device, parameter.dtype)
