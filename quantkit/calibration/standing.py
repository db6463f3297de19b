"""Where the calibration pass is after a block, for a run that goes on from there."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from quantkit.calibration.activations import Snapshot
from quantkit.calibration.folds import Fold


@dataclass(frozen=True)
class CalibrationState:
    """Where a pass is after a block: all that ``CalibrationPass.restore`` needs to continue there.

    hidden, drifted: the hidden states of the rows as the checkpoint's blocks and as the quantized
    ones make them, where these are on disk; folds: those of the last block.
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


@dataclass
class Standing:
    """Where a pass is after a block, which is known once a copy of the hidden states is on disk.

    hidden, drifted: the copies, of which some may still be being written; folds: of the last block;
    on_disk: whether the hidden states are on disk alone, so that the next block writes over what
    the copy before these holds; listed: whether this is in the journal, so that a later run starts
    from these copies and no longer from those before.
    """

    hidden: Future[Snapshot] | None
    drifted: Future[Snapshot] | None
    folds: tuple[Fold, ...]
    on_disk: bool = False
    listed: bool = False

    @property
    def known(self) -> bool:
        """Whether ``state`` has its answer at once."""
        return all(copy is None or copy.done() for copy in (self.hidden, self.drifted))

    def state(self) -> CalibrationState:
        """The state, for a later run; waits for the copies, and raises what their writing raised"""
        hidden, drifted = (
            None if copy is None else copy.result() for copy in (self.hidden, self.drifted)
        )
        return CalibrationState(hidden, drifted, self.folds)
