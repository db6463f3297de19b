"""The pass of the calibration rows through a model's blocks, measured as they pass.

The hidden states of all rows wait in ``HiddenStates`` while a block is loaded. The block is run on
one batch of rows after the other; its outputs are the hidden states that the next block starts
from. ``Needs.propagate`` decides which weights the block has when it makes them:

- ``original``: those of the checkpoint, in the same forward in which the inputs are measured.
- ``quantized``: the quantized ones, in a second forward (``carry``).
- ``corrected``: both, side by side (``calibration.corrected``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from quantkit.base.errors import InputError, not_finite
from quantkit.base.parallel import return_free_blocks
from quantkit.calibration.activations import HiddenStates
from quantkit.calibration.cache import CachedStatistics, CacheWriter
from quantkit.calibration.folds import Fold, find_folds
from quantkit.calibration.needs import Needs
from quantkit.calibration.routing import (
    all_tokens,
    count_routed,
    linears_of,
    replaced,
    too_few,
)
from quantkit.calibration.spread import Spread
from quantkit.calibration.standing import CalibrationState, Standing
from quantkit.calibration.statistics import InputStatistics, Meter, new_moment
from quantkit.calibration.text import Rows
from quantkit.model.experts import Experts
from quantkit.model.stream import Batch, Stream
from quantkit.model.stubs import hands_on

_TOKENS, _TOKENS_ON_GPU = 1024, 8192  # of a batch
_BYTES_PER_TOKEN = 1 << 20  # of a device's memory: enough for what one layer makes of a token
_PROBE_TOKENS = 64


def tokens_per_batch(device: torch.device) -> int:
    """How many tokens pass through a block together on ``device``.

    It depends on the memory that the device has, not on what is free, so that two runs on one
    device make the same sums.
    """
    if device.type != "cuda":
        return _TOKENS
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(_TOKENS, min(_TOKENS_ON_GPU, memory // _BYTES_PER_TOKEN))


def check_finite(
    inputs: Sequence[InputStatistics], stream: Stream, index: int, block: nn.Module
) -> None:
    """Raise InputError where linears of ``block``, layer ``index``, read NaN or infinity.

    Nothing could be chosen by such statistics, and the model itself would give no text. A parameter
    of the block that isn't finite is named as the cause.
    """
    # Read together, since a device is waited for.
    finite = [group.moment.diagonal().isfinite().all() for group in inputs]
    read = torch.stack([flag.to(stream.device) for flag in finite]).tolist() if finite else []
    for group, whole in zip(inputs, read, strict=True):
        if not whole:
            layer = stream.skeleton.layer_name(index)
            for name, parameter in block.named_parameters():
                if not bool(parameter.isfinite().all()):
                    raise not_finite(f"{layer}.{name}")
            raise InputError(
                f"{layer}.{group.consumers[0]} reads numbers that aren't finite, on the "
                "calibration text and before anything is quantized",
                where=str(stream.skeleton.directory),
                fix="Does the model give text in transformers? Is its config.json right "
                "(rope_theta, rms_norm_eps, dtype)?",
            )


class CalibrationPass:
    """Passes the calibration rows through the blocks of ``stream``, in order.

    needs: what is measured; hidden: where the hidden states wait between blocks; cached:
    statistics of an earlier pass over the same rows, so that nothing is measured; writer: where
    the statistics of this pass are cached; devices: that the rows are spread over, of which the
    first is the stream's; budget: bytes that the matrices of a layer's experts may take (None: no
    limit). steps: how often ``step`` is called for each block.
    """

    def __init__(
        self,
        stream: Stream,
        rows: Rows,
        needs: Needs,
        *,
        hidden: HiddenStates | None = None,
        cached: CachedStatistics | None = None,
        writer: CacheWriter | None = None,
        devices: Sequence[torch.device] = (),
        budget: int | None = None,
    ) -> None:
        self._budget = budget
        self.stream = stream
        self.needs = needs
        self._spread = Spread(devices or [stream.device])
        self._cached, self._writer = cached, writer
        self._batches: list[Batch] = []
        self._hidden = HiddenStates() if hidden is None else hidden
        self._hidden.extend(self._embed(rows))
        if len(self._spread.devices) > 1 and any(hands_on(batch.calls) for batch in self._batches):
            raise InputError(
                f"the layers of {type(stream.skeleton.model).__name__} hand each other more than "
                "hidden states, which can't be spread over several devices",
                where="--device",
                fix=f"Use --device {stream.device}.",
            )
        # Batches before this one are measured. The last one is the probe, where folds are needed.
        self._measured = len(self._batches) - 1 if needs.folds else len(self._batches)
        self._folds: list[Fold] = []
        self._standing: Standing | None = None
        self._last_copy: Standing | None = None
        self._since = time.monotonic()
        self.steps = self._measured + (0 if needs.independent else len(self._batches))

    def _embed(self, rows: Rows) -> Iterator[Tensor]:
        """The first hidden states of every batch; appends the batches as it yields."""
        parts = []
        # With cached statistics no row is needed but the probe.
        if self._cached is None:
            size = tokens_per_batch(self.stream.device)
            parts.append((rows.ids, max(1, size // rows.ids.shape[1])))
        # Folds are tried by many forwards of a block in float32, so on a few tokens only. The
        # probe is a batch of its own, since masks and positions are made for a batch's length; it
        # comes last, so that batches are numbered alike with and without it.
        if self.needs.folds:
            parts.append((rows.ids[:1, :_PROBE_TOKENS], 1))
        for ids, size in parts:
            for recorded in self.stream.begin_each(ids, size):
                # The probe stays where folds are tried.
                probe = self.needs.folds and ids is parts[-1][0]
                batch = recorded if probe else self._spread.dealt(len(self._batches), recorded)
                # The hidden states wait elsewhere; the batch keeps the arguments of its layers.
                hidden, batch.hidden = batch.hidden, batch.hidden.new_empty(0)
                self._batches.append(batch)
                yield hidden

    def measure(
        self, index: int, block: nn.Module, step: Callable[[], None] = lambda: None
    ) -> tuple[list[InputStatistics], list[Fold]]:
        """The statistics of all inputs of ``block``, which is layer ``index``, and its folds.

        The block has the checkpoint's weights. ``step`` is called after each batch.
        """
        if self._cached is not None:
            inputs = self._cached.load(index, self.stream.device)
        else:
            blocks = self._spread.copies(block)
            names = list(self.stream.skeleton.linears(index))
            inputs = self._measure_inputs(index, blocks, names, step, [])
            check_finite(inputs, self.stream, index, block)
            return_free_blocks()
            if self._writer is not None:
                self._writer.save(index, inputs)
        if self.needs.folds:
            self._folds = self._find_folds(index, block, inputs)
        # Otherwise the rows wait for the quantized weights, with which ``carry`` passes them on.
        if self.needs.independent:
            self._commit(index)
        # Another method may need what the output embedding reads, so the cache has that as well.
        if self._writer is not None and index + 1 == len(self.stream.skeleton.layers):
            self._writer.save(index + 1, [self.output()])
        return inputs, self._folds

    def measure_in_parts(
        self, index: int, block: nn.Module, step: Callable[[], None]
    ) -> Iterator[tuple[Collection[str], list[InputStatistics], list[Fold]]]:
        """What ``measure`` returns for some linears at a time, with the names of these linears.

        There is one part, unless the matrices of a layer's experts exceed their budget. Then the
        rows pass once for all that is in no expert, and once more for each group of experts. A part
        must be used before the next is asked for.
        """
        parts = self._parts(index)
        if len(parts) == 1:
            yield (parts[0], *self.measure(index, block, step))
            return
        blocks = self._spread.copies(block)
        before: list[Tensor] = []
        for place, names in enumerate(parts):
            inputs = self._measure_inputs(index, blocks, names, step, before, again=place > 0)
            check_finite(inputs, self.stream, index, block)
            yield names, inputs, []
            return_free_blocks()
        before.clear()
        if self.needs.independent:
            self._commit(index)

    def _parts(self, index: int) -> list[list[str]]:
        """The linears of a layer in the parts that are measured one after the other."""
        linears = self.stream.skeleton.linears(index)
        every = list(linears)
        # Folds are tried on a whole block.
        whole = self.needs.kind != "gram" or self.needs.folds or self._cached is not None
        if whole or self._budget is None:
            return [every]
        experts = [
            [f"{name}.{number}.{leaf}" for leaf in leaves]
            for name, mixture in self.stream.skeleton.experts(index).items()
            for number, leaves in enumerate(mixture.linears())
        ]
        # Those that read one input share a matrix, of which half is stored.
        sizes = [sum({linears[n].in_features ** 2 * 2 for n in names}) for names in experts]
        if sum(sizes) <= self._budget:
            return [every]
        inside = {name for names in experts for name in names}
        parts, room = [[name for name in every if name not in inside]], 0
        for names, size in zip(experts, sizes, strict=True):
            if size > room:
                parts.append([])
                room = max(self._budget, size)
            parts[-1] += names
            room -= size
        return parts

    def carry(self, index: int, block: nn.Module, step: Callable[[], None]) -> None:
        """Pass the rows through ``block`` with the weights that it has now."""
        blocks = self._spread.copies(block)
        for number in range(len(self._batches)):
            self._run(index, blocks, number, keep=True)
            step()
        self._commit(index)

    def _commit(self, index: int) -> None:
        """Make what the rows became in layer ``index`` current, with a copy on disk or without."""
        states = self._states
        # A copy in the background is made where the blocks since the last took twice as long as
        # writing takes, which so has the disk for half of the time at most. What the journal lists
        # must stay whole. What comes after the last block is soon done.
        copy = (
            index + 1 < len(self.stream.skeleton.layers)
            and (self._last_copy is None or self._last_copy.listed)
            and time.monotonic() - self._since >= 2 * max(s.copy_seconds for s in states)
        )
        copies = [hidden.commit(copy=copy) for hidden in states]
        if any(made is None and not s.empty for made, s in zip(copies, states, strict=True)):
            self._standing = None
            return
        on_disk = any(hidden.spilled for hidden in states)
        hidden, drifted = (*copies, None)[:2]
        self._standing = Standing(hidden, drifted, tuple(self._folds), on_disk)
        self._last_copy, self._since = self._standing, time.monotonic()

    @property
    def _states(self) -> list[HiddenStates]:
        """What waits between blocks."""
        return [self._hidden]

    def close(self) -> None:
        """Give up copies of hidden states that are still being written."""
        for hidden in self._states:
            hidden.close()

    def output(self) -> InputStatistics:
        """Statistics of what the output embedding reads, after the last block; no consumers."""
        if self._cached is not None:
            [cached] = self._cached.load(len(self.stream.skeleton.layers), self.stream.device)
            return cached
        width = self._hidden_size
        moment = new_moment(self.needs.kind, width, self.stream.device)
        statistics = InputStatistics([], width, moment)
        with self.stream.before_head() as read:
            for number in range(self._measured):
                batch, states = self._batches[number], self._hidden.read(number)
                home = replace(batch, ids=batch.ids.to(self.stream.device))
                hidden = read(home, states.to(self.stream.device)).reshape(-1, width)
                moment.add(hidden)
                statistics.tokens += len(hidden)
        return statistics

    def state(self) -> Standing | None:
        """Where the pass is after the last block; None where no copy of that was begun."""
        return self._standing

    def restore(self, state: CalibrationState) -> bool:
        """Continue after the block of ``state``; False where its files are missing or damaged."""
        # What layers handed on beside the hidden states is gone: all of them must run again.
        if any(hands_on(batch.calls) for batch in self._batches):
            return False
        # With cached statistics and without folds there are no rows, and so no hidden states.
        if self._batches and (state.hidden is None or not self._hidden.restore(state.hidden)):
            return False
        self._folds = list(state.folds)
        return True

    @property
    def _hidden_size(self) -> int:
        size: int = self.stream.skeleton.config.get_text_config().hidden_size
        return size

    def _measure_inputs(
        self,
        index: int,
        blocks: Sequence[nn.Module],
        names: Sequence[str],
        step: Callable[[], None],
        before: list[Tensor],
        *,
        again: bool = False,
    ) -> list[InputStatistics]:
        """What the linears of these names read; the rows go on to the next block, but for a pass
        that is made ``again``. before: gets what they were, where that is needed once more."""
        experts = self.stream.skeleton.experts(index)

        def pass_on(number: int) -> None:
            if experts and not self._hidden.spilled:
                before.append(self._hidden.read(number))
            self._run(index, blocks, number, keep=self.needs.independent)
            step()

        def pass_again(number: int) -> None:
            # What was written is current only after ``commit`` where it went to disk.
            hidden = before[number] if before else self._hidden.read(number)
            self._forward(index, blocks, number, hidden)

        inputs = self._metered(blocks, names, pass_again if again else pass_on)
        count_routed(experts, inputs)
        some = set(names)
        chosen = too_few(experts, inputs, some)
        if not chosen:
            return inputs
        with ExitStack() as stack:
            for copy in blocks:
                mixtures = {name: copy.get_submodule(name) for name in experts}
                stack.enter_context(all_tokens(cast(Mapping[str, Experts], mixtures), chosen))
            others = self._metered(blocks, linears_of(experts, chosen), pass_again)
        return replaced(inputs, others)

    def _metered(
        self, blocks: Sequence[nn.Module], names: Sequence[str], forward: Callable[[int], None]
    ) -> list[InputStatistics]:
        """What the linears of these names read, in each device's copy of the block, while
        ``forward`` is called with the number of every batch that is measured."""
        new = partial(new_moment, self.needs.kind)
        meters = [
            Meter({name: cast(nn.Linear, copy.get_submodule(name)) for name in names}, new)
            for copy in blocks
        ]
        with ExitStack() as stack:
            ends = [stack.enter_context(meter.watching()) for meter in meters]
            for number in range(self._measured):
                forward(number)
                ends[self._spread.place(number)]()
        return self._spread.joined(
            [meter.inputs for meter in meters], self.needs.kind, solve_apart=self.needs.apart
        )

    def _find_folds(
        self, index: int, block: nn.Module, inputs: list[InputStatistics]
    ) -> list[Fold]:
        config = self.stream.skeleton.config.get_text_config()
        kv_heads = getattr(config, "num_key_value_heads", None)
        probe = self._measured
        call, hidden = self._batches[probe].calls[index], self._hidden.read(probe)
        groups = [group.consumers for group in inputs]
        folds = find_folds(block, groups, call, hidden, kv_heads, self._folds)
        if self.needs.independent:
            self._run(index, [block], probe, keep=True)
        return folds

    def _run(self, index: int, blocks: Sequence[nn.Module], number: int, *, keep: bool) -> None:
        """Run a batch through its device's copy of the block; ``keep``: its output is the batch's
        next hidden state."""
        hidden = self._forward(index, blocks, number, self._hidden.read(number))
        if keep:
            self._hidden.write(number, hidden)

    def _forward(
        self, index: int, blocks: Sequence[nn.Module], number: int, hidden: Tensor
    ) -> Tensor:
        # The probe, which comes last, is on the first device alone.
        probes = self.needs.folds and number == self._measured
        block = blocks[0 if probes else self._spread.place(number)]
        return self.stream.run(index, block, self._batches[number], hidden)
