"""The comparison of a baseline with its artifacts, as frozen dataclasses that become JSON.

Numbers keep full precision here; they are rounded only where they are printed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from quantkit.results.cost import Cost
from quantkit.results.localization import Localisation
from quantkit.results.quality import Quality
from quantkit.results.verdict import GateOutcome, Verdict


@dataclass(frozen=True)
class Variant:
    """A row of the comparison: the baseline, the noise floor, or an artifact."""

    name: str
    path: str
    recipe: str | None
    method: str | None
    format: str
    bits_per_weight: float
    disk_bytes: int
    quality: Quality | None = None
    cost: Cost | None = None
    gates: tuple[GateOutcome, ...] = ()
    verdict: Verdict | None = None
    localisation: Localisation | None = None
    manifest: dict[str, Any] | None = None  # quantkit.json, where the artifact has one
    run: dict[str, Any] | None = None  # run.json

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "quality": self.quality.to_json() if self.quality else None,
            "gates": [gate.to_json() for gate in self.gates],
        }


@dataclass(frozen=True)
class CaseInput:
    """What a regression case asks and what its answer must be, as text."""

    id: str
    prompt: str
    expected: str


@dataclass(frozen=True)
class Occasion:
    """When, by what and on which machine a comparison was made.

    model: the baseline as it was named; finished: UTC, ISO 8601.
    """

    model: str
    suite_digest: str
    finished: str
    quantkit: str
    libraries: dict[str, str]
    machine: dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """The whole table, what differs between its rows, and the verdict over all.

    goal: what the artifacts are for, in their owner's words.
    """

    suite: str | None
    baseline: Variant
    references: tuple[Variant, ...]  # the noise floor; the baseline in another engine
    variants: tuple[Variant, ...]
    differences: tuple[str, ...]
    way_back: str
    verdict: Verdict | None
    goal: str | None = None
    cases: tuple[CaseInput, ...] = ()
    occasion: Occasion | None = None

    @property
    def models(self) -> tuple[Variant, ...]:
        """All rows."""
        return (self.baseline, *self.references, *self.variants)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "suite": self.suite,
            "verdict": self.verdict,
            "goal": self.goal,
            "baseline": self.baseline.to_json(),
            "references": [reference.to_json() for reference in self.references],
            "variants": [variant.to_json() for variant in self.variants],
            "differences": list(self.differences),
            "way_back": self.way_back,
            "cases": [asdict(case) for case in self.cases],
            "occasion": asdict(self.occasion) if self.occasion else None,
        }
