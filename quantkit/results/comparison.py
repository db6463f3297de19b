"""The comparison of a baseline with its artifacts, as frozen dataclasses that become JSON.

Numbers keep their full precision here; only what prints them rounds.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from quantkit.results.cost import Cost
from quantkit.results.localization import Localization
from quantkit.results.manifest import Manifest, RunRecord
from quantkit.results.quality import Quality
from quantkit.results.verdict import GateOutcome, Verdict


@dataclass(frozen=True)
class Variant:
    """One model of the comparison: the baseline, a reference, or an artifact.

    recipe: its name and version; method, format: None and the checkpoint's format for what isn't
    quantized; disk_bytes: of the files that hold weights; gates, verdict: for artifacts alone;
    manifest, run: the content of quantkit.json and run.json, where there are such files.
    """

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
    localization: Localization | None = None
    manifest: Manifest | None = None
    run: RunRecord | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "quality": self.quality.to_json() if self.quality else None,
            "gates": [gate.to_json() for gate in self.gates],
            "manifest": self.manifest.to_json() if self.manifest else None,
            "run": self.run.to_json() if self.run else None,
        }


@dataclass(frozen=True)
class CaseInput:
    """What a regression case asks, and what its answer must be, as text for reports."""

    id: str
    prompt: str
    expected: str


@dataclass(frozen=True)
class Occasion:
    """When, from which model and on which machine a comparison was made.

    model: the baseline's name or path as given; finished: UTC, ISO 8601; quantkit, libraries:
    versions.
    """

    model: str
    suite_digest: str
    finished: str
    quantkit: str
    libraries: dict[str, str]
    machine: dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """All models side by side, how they differ, and the verdict over all artifacts.

    suite: its name and version; references: models to read the artifacts' figures by, which are
    the noise floor, the base without adapters and the baseline as GGUF; differences: sentences
    about what differs between the models, and judging's remarks; way_back: how to serve the
    baseline again; goal: what the artifacts are for, in their owner's words.
    """

    suite: str | None
    baseline: Variant
    references: tuple[Variant, ...]
    variants: tuple[Variant, ...]
    differences: tuple[str, ...]
    way_back: str
    verdict: Verdict | None
    goal: str | None = None
    cases: tuple[CaseInput, ...] = ()
    occasion: Occasion | None = None

    @property
    def models(self) -> tuple[Variant, ...]:
        """The baseline, the references and the artifacts, in this order."""
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
