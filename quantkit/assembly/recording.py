"""Finished steps on their way into the journal, each listed once all it describes is on disk."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass

from quantkit.assembly.journal import Journal, Step
from quantkit.calibration.passing import CalibrationPass
from quantkit.calibration.standing import Standing


@dataclass(frozen=True)
class _Finished:
    """A step, whose bytes may still be being written.

    calibrated: whether rows pass; standing: where they are afterwards, where that can be returned
    to.
    """

    step: Future[Step]
    calibrated: bool = False
    standing: Standing | None = None


class Recording:
    """Lists the steps of one run in its journal, in order.

    A run that is stopped can go on only after a step whose hidden states have a copy on disk. A
    step without one waits for the next that has: both are listed together then.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._steps: deque[_Finished] = deque()
        self._copying: tuple[int, Standing] | None = None  # and the number of steps before it

    def add(self, step: Step | Future[Step], calibration: CalibrationPass | None = None) -> None:
        """Add the next step. calibration: what stands after it, where rows pass."""
        standing = None if calibration is None else calibration.state()
        finished = _Finished(_future(step), calibration is not None, standing)
        self._steps.append(finished)
        if standing is not None and standing.on_disk:
            finished.step.result()
        self.poll()

    def poll(self) -> None:
        """List what has been finished meanwhile. Raises what writing it raised."""
        while self._steps and self._steps[0].step.done():
            finished = self._steps.popleft()
            self._journal.hold(finished.step.result())
            if not finished.calibrated:
                self._journal.list_steps(len(self._journal.steps))
            elif finished.standing is not None:
                self._copying = len(self._journal.steps), finished.standing
        if self._copying is not None and self._copying[1].known:
            count, standing = self._copying
            self._journal.list_steps(count, standing.state())
            standing.listed, self._copying = True, None

    def finish(self, step: Step | Future[Step]) -> None:
        """Add the last step, after which no rows are needed, and list all."""
        self._steps.append(_Finished(_future(step)))
        for finished in self._steps:
            finished.step.result()
        self.poll()


def _future(step: Step | Future[Step]) -> Future[Step]:
    if isinstance(step, Future):
        return step
    done: Future[Step] = Future()
    done.set_result(step)
    return done
