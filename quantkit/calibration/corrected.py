"""The pass that measures what the quantized model reads beside what the unquantized one reads.

With ``propagate: corrected`` the calibration rows pass through two models side by side. The
*original* hidden states are those of the checkpoint's blocks, the *drifted* ones those of the
quantized blocks. X is what a linear reads in the unquantized model, Y what it reads in the
quantized one. Measured are YᵀY and the drift (X - Y)ᵀ Y, from which ``methods.drift`` corrects the
weights (GPTAQ, Li et al., arXiv 2504.02692).

A block is passed in three steps:

1. It still has the checkpoint's weights. The original rows run through it, which gives their hidden
   states for the next block, and each distinct input of its linears is remembered: X.
2. For one input after the other, in order of execution: the drifted rows run through the block up
   to the linears that read it: Y. It is measured beside the remembered X, and the caller gives
   these linears their quantized weights before the next input is measured.
3. All weights are quantized. The drifted rows run through the block, which gives their hidden
   states for the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.base.errors import InputError
from quantkit.base.parallel import return_free_blocks
from quantkit.calibration.activations import HiddenStates
from quantkit.calibration.needs import Needs
from quantkit.calibration.passing import CalibrationPass, check_finite
from quantkit.calibration.replay import Replay
from quantkit.calibration.standing import CalibrationState
from quantkit.calibration.statistics import Diagonal, Drift, Gram, InputStatistics, Meter
from quantkit.calibration.text import Rows
from quantkit.model.stream import Stream
from quantkit.model.stubs import hands_on


class _Reached(Exception):
    """A forward came to the linear whose input is read; the rest of it is not needed."""


class _RememberedInput(Diagonal):
    """Keeps the rows of an input, one tensor for each batch, where a moment would sum them."""

    def __init__(self, rows: HiddenStates, device: torch.device) -> None:
        super().__init__(0, device)
        self.rows = rows

    def add(self, rows: Tensor) -> None:
        self.rows.extend([rows])


class CorrectedPass(CalibrationPass):
    """Passes the calibration rows through the unquantized and the quantized model, side by side.

    hidden, drifted: where the original and the drifted hidden states wait between blocks;
    embedding: a function from the numbers of a first and a last row (exclusive) to these rows of
    the quantized embedding, (rows, hidden_size); None where the embedding isn't quantized; store:
    makes a place for the remembered rows of one input, from a name for it.
    """

    def __init__(
        self,
        stream: Stream,
        rows: Rows,
        needs: Needs,
        *,
        hidden: HiddenStates | None = None,
        drifted: HiddenStates | None = None,
        embedding: Callable[[int, int], Tensor] | None = None,
        store: Callable[[str], HiddenStates] = lambda name: HiddenStates(name=name),
    ) -> None:
        super().__init__(stream, rows, needs, hidden=hidden)
        if any(hands_on(batch.calls) for batch in self._batches):
            raise InputError(
                f"the layers of {type(stream.skeleton.model).__name__} hand each other more than "
                "hidden states, which two models side by side would mix up",
                where="quantize.propagate",
                fix="Set it to original or quantized.",
            )
        self._drifted = HiddenStates(name="drifted") if drifted is None else drifted
        self._store = store
        if embedding is None:
            self._drifted.extend(map(self._hidden.read, range(len(self._batches))))
        else:
            size = self._batches[0].ids.shape[0]
            batches = stream.begin_each(rows.ids, size, embedding)
            self._drifted.extend(batch.hidden for batch in batches)

    def measure_in_turn(
        self, index: int, block: nn.Module, step: Callable[[], None]
    ) -> Iterator[InputStatistics]:
        """Statistics of one input of ``block``, layer ``index``, after the other, with their drift.

        The block has the checkpoint's weights at first. Before the next input is asked for, the
        linears that read the last one must have their quantized weights: so Y holds the error of
        all that was quantized before, within the block too. ``step`` is called after each batch
        of the original rows, and after each of the drifted ones.
        """
        linears = self.stream.skeleton.linears(index)
        replay = Replay(block, linears)
        inputs = self._remember(index, block, linears, replay, step)
        for group in inputs:
            self._measure_beside(index, block, group, replay)
            check_finite([group], self.stream, index, block)
            yield group
            replay.finish(group.consumers)
            # The caller is done with the matrices, which are the largest of all that is held.
            group.moment, group.drift = Diagonal(0, self.stream.device), None
            return_free_blocks()
        for number, batch in enumerate(self._batches):
            hidden = self._drifted.read(number)
            forward = partial(self.stream.run, index, block, batch, hidden)
            self._drifted.write(number, replay.compute(number, batch, forward))
            step()
        self._commit(index)

    def _remember(
        self,
        index: int,
        block: nn.Module,
        linears: dict[str, nn.Linear],
        replay: Replay,
        step: Callable[[], None],
    ) -> list[InputStatistics]:
        """Run the original rows through ``block``; every input's moment remembers its rows."""

        def remembered(width: int, device: torch.device) -> _RememberedInput:
            return _RememberedInput(self._store(f"inputs-{len(meter.inputs)}"), device)

        meter = Meter(linears, remembered)
        with meter.watching() as end_forward:
            for number, batch in enumerate(self._batches):
                # One forward shows which parts the block has.
                with nullcontext() if number else replay.watching(batch):
                    self._run(index, [block], number, keep=True)
                end_forward()
                step()
        return meter.inputs

    def _measure_beside(
        self, index: int, block: nn.Module, group: InputStatistics, replay: Replay
    ) -> None:
        """Measure Y, which the drifted rows make of an input, beside the remembered X."""
        remembered, device = group.moment, self.stream.device
        assert isinstance(remembered, _RememberedInput)
        moment, drift = Gram(group.width, device), Drift(group.width, device)
        # X of a batch is needed once. Where Y lets a part of the block be replayed, it takes X's
        # place, so that one copy of the rows is enough.
        keeps = replay.use_inputs(group.consumers, remembered.rows)
        for number, batch in enumerate(self._batches):
            forward = partial(self._read_input, index, block, number, group.consumers[0])
            rows = replay.compute(number, batch, forward)
            moment.add(rows)
            drift.add(remembered.rows.read(number), rows)
            if keeps:
                remembered.rows.replace(number, rows)
        group.moment, group.drift = moment, drift.matrix()

    def _read_input(self, index: int, block: nn.Module, number: int, linear: str) -> Tensor:
        """What the drifted rows of a batch give ``linear`` to read, (tokens, width)."""
        seen: list[Tensor] = []

        def reached(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0])
            raise _Reached

        handle = block.get_submodule(linear).register_forward_pre_hook(reached)
        with suppress(_Reached):
            self.stream.run(index, block, self._batches[number], self._drifted.read(number))
        handle.remove()
        return seen.pop().flatten(0, -2)

    def output(self) -> InputStatistics:
        width, device = self._hidden_size, self.stream.device
        moment, drift = Gram(width, device), Drift(width, device)
        statistics = InputStatistics([], width, moment)
        with self.stream.before_head() as read:
            for number, batch in enumerate(self._batches):
                original = read(batch, self._hidden.read(number)).reshape(-1, width)
                drifted = read(batch, self._drifted.read(number)).reshape(-1, width)
                drift.add(original, drifted)
                moment.add(drifted)
                statistics.tokens += len(drifted)
        statistics.drift = drift.matrix()
        return statistics

    @property
    def _states(self) -> list[HiddenStates]:
        return [self._hidden, self._drifted]

    def restore(self, state: CalibrationState) -> bool:
        if not super().restore(state):
            return False
        return state.drifted is not None and self._drifted.restore(state.drifted)
