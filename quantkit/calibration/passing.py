"""The calibration rows on their way through the blocks, measured as they pass."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from quantkit.calibration.folds import Fold, find_folds
from quantkit.calibration.statistics import InputStatistics, Kind, collect
from quantkit.calibration.text import Rows
from quantkit.model.stream import Batch, Stream

_TOKENS_PER_BATCH = 4096
_PROBE_TOKENS = 64


class CalibrationPass:
    """Carries rows from block to block (``propagate: original``: through unquantized weights).

    kind: what is measured; folds: whether it is also found out what may be rescaled.
    """

    def __init__(self, stream: Stream, rows: Rows, kind: Kind, *, folds: bool) -> None:
        batch_size = max(1, _TOKENS_PER_BATCH // rows.ids.shape[1])
        self.stream = stream
        self.kind = kind
        self.batches = stream.begin(rows.ids, batch_size)
        self.folds: list[Fold] = []
        self.probe: list[Batch] = stream.begin(rows.ids[:1, :_PROBE_TOKENS], 1) if folds else []

    def through(
        self, index: int, block: nn.Module, step: Callable[[], None]
    ) -> tuple[list[InputStatistics], list[Fold]]:
        """Carry the rows through ``block``, layer ``index``; ``step`` is called for each batch."""
        skeleton = self.stream.skeleton
        linears = skeleton.linears(index)
        inputs = collect(self.stream, index, block, linears, self.batches, self.kind, step)
        groups = [group.consumers for group in inputs]
        kv_heads = getattr(skeleton.config.get_text_config(), "num_key_value_heads", None)
        for probe in self.probe:
            self.folds = find_folds(
                block, groups, probe.calls[index], probe.hidden, kv_heads, self.folds
            )
        self.stream.advance(index, block, self.probe)
        return inputs, self.folds
