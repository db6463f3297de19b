"""What the gates of a suite decide about an artifact."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from quantkit.results.quality import Interval


class Verdict(enum.StrEnum):
    """What the gates say."""

    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"

    @classmethod
    def over(cls, verdicts: Iterable[Verdict]) -> Verdict:
        """One verdict over many: the first of FAIL, INCONCLUSIVE, PASS that is among them."""
        found = set(verdicts)
        return next((v for v in (cls.FAIL, cls.INCONCLUSIVE) if v in found), cls.PASS)


@dataclass(frozen=True)
class GateOutcome:
    """One gate: the bounds, what was measured, and what that says.

    interval: what was compared with the bounds, where the gate asks for confidence; more: about so
    many further rows or cases would decide an inconclusive one, None where no number would.
    """

    metric: str
    value: float | None
    min: float | None
    max: float | None
    verdict: Verdict
    confidence: float | None = None
    interval: Interval | None = None
    more: int | None = None

    @property
    def passed(self) -> bool:
        return self.verdict is Verdict.PASS

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}
