"""What the gates of a suite decide about an artifact."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from quantkit.results.quality import Interval


class Verdict(enum.StrEnum):
    """The decision of one gate, or of several together."""

    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"

    @classmethod
    def over(cls, verdicts: Iterable[Verdict]) -> Verdict:
        """FAIL if any verdict is FAIL, else INCONCLUSIVE if any is, else PASS."""
        given = set(verdicts)
        return next((v for v in (cls.FAIL, cls.INCONCLUSIVE) if v in given), cls.PASS)


@dataclass(frozen=True)
class GateOutcome:
    """One gate applied to one artifact.

    value: the metric as measured, None where it wasn't; min, max: the gate's inclusive bounds;
    confidence, interval: where the gate asks for confidence, the metric's interval decides in
    place of the value; more: about how many further rows or cases would decide an inconclusive
    gate, None where no number would.
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
