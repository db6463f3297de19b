"""The calibration rows on their way through the blocks, measured as they pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.base.parallel import return_free_blocks
from quantkit.calibration.activations import HiddenStates, Snapshot
from quantkit.calibration.cache import Keeper, Kept
from quantkit.calibration.folds import Fold, find_folds
from quantkit.calibration.needs import Needs
from quantkit.calibration.replay import Replay
from quantkit.calibration.statistics import (
    Diagonal,
    Drift,
    Gram,
    InputStatistics,
    Meter,
    new_moment,
)
from quantkit.calibration.text import Rows
from quantkit.model.stream import Batch, Stream

_TOKENS_PER_BATCH = 1024
_PROBE_TOKENS = 64


@dataclass(frozen=True)
class CalibrationState:
    """Where a pass stands after a block: all that ``restore`` needs to go on from there.

    hidden and drifted: the hidden states of the rows as they pass through the checkpoint's blocks
    and through the quantized ones, where these are kept; folds: found in the last block.
    """

    hidden: Snapshot | None
    drifted: Snapshot | None
    folds: tuple[Fold, ...]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> CalibrationState:
        """Inverse of ``dataclasses.asdict``."""
        hidden, drifted = (
            None if value[name] is None else Snapshot(**value[name])
            for name in ("hidden", "drifted")
        )
        folds = (Fold(**{**fold, "consumers": tuple(fold["consumers"])}) for fold in value["folds"])
        return cls(hidden, drifted, tuple(folds))


class _Reached(Exception):
    """The linear whose input is needs was called."""


class _Remembered(Diagonal):
    """Stands in for a moment that will be summed when the rows can be seen beside others."""

    def __init__(self, rows: HiddenStates, device: torch.device) -> None:
        super().__init__(0, device)
        self.rows = rows

    def add(self, rows: Tensor) -> None:
        self.rows.start([rows])


class CalibrationPass:
    """Carries rows from block to block.

    hidden: where the rows wait between blocks; kept: statistics of an earlier pass, with which
    nothing needs to be carried but a short probe for finding folds; keeper: takes those of this
    one. steps: how often ``step`` will be called for each block. drifted: where the rows that
    pass through quantized blocks wait, where both are needs; embedding: its rows
    from the first to before the last of two numbers, as these read them, None where they stay as
    they are; spare: where a block's inputs wait.
    """

    def __init__(
        self,
        stream: Stream,
        rows: Rows,
        needs: Needs,
        *,
        hidden: HiddenStates | None = None,
        kept: Kept | None = None,
        keeper: Keeper | None = None,
        drifted: HiddenStates | None = None,
        embedding: Callable[[int, int], Tensor] | None = None,
        spare: Callable[[str], HiddenStates] = lambda name: HiddenStates(name=name),
    ) -> None:
        self.stream = stream
        self.needs = needs
        self._kept, self._keeper = kept, keeper
        self._folds: list[Fold] = []
        self._batches: list[Batch] = []
        self._hidden = HiddenStates() if hidden is None else hidden
        self._hidden.start(self._embedded(rows))
        self._drifted = HiddenStates(name="drifted") if drifted is None else drifted
        self._spare = spare
        if needs.propagate == "corrected":
            if embedding is None:
                self._drifted.start(map(self._hidden.read, range(len(self._batches))))
            else:
                size = self._batches[0].ids.shape[0]
                batches = stream.begin_each(rows.ids, size, embedding)
                self._drifted.start(batch.hidden for batch in batches)
        self._probe = len(self._batches) - 1 if needs.folds else len(self._batches)
        self._snapshot: Snapshot | None = None
        self._drift: Snapshot | None = None
        self.steps = self._probe + (0 if needs.independent else len(self._batches))

    def _embedded(self, rows: Rows) -> Iterator[Tensor]:
        """The first hidden states; the probe's come last."""
        parts = []
        if self._kept is None:
            parts.append((rows.ids, max(1, _TOKENS_PER_BATCH // rows.ids.shape[1])))
        if self.needs.folds:
            parts.append((rows.ids[:1, :_PROBE_TOKENS], 1))
        for ids, size in parts:
            for batch in self.stream.begin_each(ids, size):
                hidden, batch.hidden = batch.hidden, batch.hidden.new_empty(0)
                self._batches.append(batch)
                yield hidden

    def through(
        self, index: int, block: nn.Module, step: Callable[[], None] = lambda: None
    ) -> tuple[list[InputStatistics], list[Fold]]:
        """The inputs of ``block``, layer ``index``, and what may be rescaled there.

        ``step`` is called after each batch of rows.
        """
        if self._kept is not None:
            inputs = self._kept.load(index, self.stream.device)
        else:
            inputs = self._measure(index, block, step)
            return_free_blocks()
            if self._keeper is not None:
                self._keeper.save(index, inputs)
        if self.needs.folds:
            self._folds = self._find_folds(index, block, inputs)
        if self.needs.independent:
            self._snapshot = self._hidden.turn()
        if self._keeper is not None and index + 1 == len(self.stream.skeleton.layers):
            self._keeper.save(index + 1, [self.output()])
        return inputs, self._folds

    def output(self) -> InputStatistics:
        """What the output embedding reads, once the rows are through all blocks; no consumers."""
        if self._kept is not None:
            [found] = self._kept.load(len(self.stream.skeleton.layers), self.stream.device)
            return found
        width, device = (
            self.stream.skeleton.config.get_text_config().hidden_size,
            self.stream.device,
        )
        found = InputStatistics([], width, new_moment(self.needs.kind, width, device))
        corrected = self.needs.propagate == "corrected"
        drift = Drift(width, device) if corrected else None
        with self.stream.before_head() as read:
            for place in range(self._probe):
                batch = self._batches[place]
                rows = read(batch, self._hidden.read(place)).reshape(-1, width)
                if drift is not None:
                    drifted = read(batch, self._drifted.read(place)).reshape(-1, width)
                    drift.add(rows, drifted)
                    rows = drifted
                found.moment.add(rows)
                found.tokens += len(rows)
        found.drift = None if drift is None else drift.matrix()
        return found

    def _measure(
        self, index: int, block: nn.Module, step: Callable[[], None]
    ) -> list[InputStatistics]:
        meter = Meter(self.stream.skeleton.linears(index), partial(new_moment, self.needs.kind))
        with meter.watching() as forget:
            for place in range(self._probe):
                self._run(index, block, place, keep=self.needs.independent)
                forget()
                step()
        return meter.inputs

    def _find_folds(
        self, index: int, block: nn.Module, inputs: list[InputStatistics]
    ) -> list[Fold]:
        config = self.stream.skeleton.config.get_text_config()
        kv_heads = getattr(config, "num_key_value_heads", None)
        call, hidden = self._batches[self._probe].calls[index], self._hidden.read(self._probe)
        groups = [group.consumers for group in inputs]
        found = find_folds(block, groups, call, hidden, kv_heads, self._folds)
        if self.needs.independent:
            self._run(index, block, self._probe, keep=True)
        return found

    def carry(self, index: int, block: nn.Module, step: Callable[[], None]) -> None:
        """Let the rows go on through ``block`` as it is now (``propagate: quantized``)."""
        for place in range(len(self._batches)):
            self._run(index, block, place, keep=True)
            step()
        self._snapshot = self._hidden.turn()

    def corrected(
        self, index: int, block: nn.Module, step: Callable[[], None]
    ) -> Iterator[InputStatistics]:
        """One input of ``block`` after the other (``propagate: corrected``): what is read there
        after all that was quantized before, beside what the unquantized model reads.

        Its readers must have got their new weights before the next one is asked for.
        """

        def remembered(width: int, device: torch.device) -> _Remembered:
            return _Remembered(self._spare(f"inputs-{len(meter.inputs)}"), device)

        linears = self.stream.skeleton.linears(index)
        meter, replay = Meter(linears, remembered), Replay(block, linears)
        with meter.watching() as forget:
            for place, batch in enumerate(self._batches):
                with nullcontext() if place else replay.watching(batch):
                    self._run(index, block, place, keep=True)
                forget()
                step()
        for group in meter.inputs:
            self._measure_beside(index, block, group, replay)
            yield group
            replay.finish(group.consumers)
            group.moment, group.drift = Diagonal(0, self.stream.device), None  # they are large
            return_free_blocks()
        for place, batch in enumerate(self._batches):
            was = self._drifted.read(place)
            becomes = partial(self.stream.run, index, block, batch, was)
            self._drifted.write(place, replay.compute(place, batch, becomes))
            step()
        self._snapshot, self._drift = self._hidden.turn(), self._drifted.turn()

    def _measure_beside(
        self, index: int, block: nn.Module, group: InputStatistics, replay: Replay
    ) -> None:
        """Measure an input as the block is now, beside the same input as it is remembered."""
        remembered, device = group.moment, self.stream.device
        assert isinstance(remembered, _Remembered)
        moment, drift = Gram(group.width, device), Drift(group.width, device)
        kept = replay.keep(group.consumers, remembered.rows)
        for place, batch in enumerate(self._batches):
            reads = partial(self._reads, index, block, place, group.consumers[0])
            rows = replay.compute(place, batch, reads)
            moment.add(rows)
            drift.add(remembered.rows.read(place), rows)
            if kept:
                remembered.rows.replace(place, rows)
        group.moment, group.drift = moment, drift.matrix()

    def _reads(self, index: int, block: nn.Module, place: int, name: str) -> Tensor:
        """What the linear ``name`` reads as the block is now, (tokens, width)."""
        seen: list[Tensor] = []

        def reached(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0])
            raise _Reached

        handle = block.get_submodule(name).register_forward_pre_hook(reached)
        with suppress(_Reached):
            self.stream.run(index, block, self._batches[place], self._drifted.read(place))
        handle.remove()
        return seen.pop().flatten(0, -2)

    def state(self) -> CalibrationState:
        """Where the pass stands after the last block that the rows have passed through."""
        return CalibrationState(self._snapshot, self._drift, tuple(self._folds))

    def restore(self, state: CalibrationState) -> bool:
        """Go on from a state; False where its hidden states are gone or damaged."""
        if self._batches and (state.hidden is None or not self._hidden.restore(state.hidden)):
            return False
        if self.needs.propagate == "corrected" and (
            state.drifted is None or not self._drifted.restore(state.drifted)
        ):
            return False
        self._folds = list(state.folds)
        return True

    def _run(self, index: int, block: nn.Module, place: int, *, keep: bool) -> None:
        hidden = self.stream.run(index, block, self._batches[place], self._hidden.read(place))
        if keep:
            self._hidden.write(place, hidden)
