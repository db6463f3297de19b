"""What was measured and decided, as frozen dataclasses that become JSON.

Numbers keep full precision here; they are rounded only where they are printed.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from quantkit.results.harness import HarnessResult
from quantkit.results.localization import Localisation
from quantkit.results.metrics import HARNESS, REGRESSION_METRICS, split_tag


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
class Interval:
    """Where a metric's true value lies, judged by ``samples`` independent rows or cases (``unit``).

    Two-sided: at ``confidence`` 0.95 the truth lies below ``low`` in 2.5% of all such samples, and
    above ``high`` in 2.5%. kind: how it was made.
    """

    low: float
    high: float
    confidence: float
    kind: str
    samples: int
    unit: str


@dataclass(frozen=True)
class RowSums:
    """Sums over the predicted tokens of each row of likelihood text, nats.

    nll and baseline_nll: negative log-likelihoods of the true tokens; kl: KL(baseline ‖ variant);
    agreed: tokens where both rank the same token first. All intervals over rows follow from these.
    """

    tokens: tuple[int, ...]
    nll: tuple[float, ...]
    baseline_nll: tuple[float, ...]
    kl: tuple[float, ...]
    agreed: tuple[int, ...]


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood; stderr over sequences; ratio to the baseline's."""

    value: float
    stderr: float
    ratio: float | None = None


@dataclass(frozen=True)
class KlDivergence:
    """KL(baseline ‖ variant) a token, in nats: mean with its 95% interval over sequences, p99."""

    mean: float
    low: float
    high: float
    p99: float


@dataclass(frozen=True)
class CheckOutcome:
    """One check of a case on either side, and why it failed."""

    check: str
    passed: bool
    baseline_passed: bool
    why: str | None
    baseline_why: str | None


@dataclass(frozen=True)
class CaseOutcome:
    """One regression case: what was answered, and whether that passed, on either side."""

    id: str
    passed: bool
    baseline_passed: bool
    critical: bool
    tags: tuple[str, ...]
    answer: str
    baseline_answer: str
    weight: float = 1.0
    checks: tuple[CheckOutcome, ...] = ()


@dataclass(frozen=True)
class RegressionResult:
    """Cases that pass, and how that differs from the baseline's.

    slice_cases: a tag with fewer cases is no slice for the worst slice to be looked for in.
    """

    cases: tuple[CaseOutcome, ...]
    slice_cases: int = 5

    @property
    def total(self) -> int:
        return len(self.cases)

    @property
    def passed(self) -> int:
        return sum(case.passed for case in self.cases)

    @property
    def pass_rate(self) -> float:
        return self.passed / self.total

    @property
    def weighted_pass_rate(self) -> float:
        """Share of the cases' weight that passes."""
        return sum(c.weight for c in self.cases if c.passed) / sum(c.weight for c in self.cases)

    @property
    def baseline_passed(self) -> int:
        return sum(case.baseline_passed for case in self.cases)

    @property
    def difference(self) -> float:
        """The pass rate minus the baseline's."""
        return (self.passed - self.baseline_passed) / self.total

    @property
    def broken(self) -> int:
        """Passed by the baseline, failed now."""
        return sum(case.baseline_passed and not case.passed for case in self.cases)

    @property
    def broken_critical(self) -> int:
        return sum(c.baseline_passed and not c.passed and c.critical for c in self.cases)

    @property
    def fixed(self) -> int:
        """Failed by the baseline, passed now."""
        return sum(case.passed and not case.baseline_passed for case in self.cases)

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags that cases have, in the order of the cases."""
        return tuple(dict.fromkeys(tag for case in self.cases for tag in case.tags))

    def tagged(self, tag: str) -> RegressionResult | None:
        """The cases with one tag alone, or None where there are none."""
        cases = tuple(case for case in self.cases if tag in case.tags)
        return RegressionResult(cases, self.slice_cases) if cases else None

    def slices(self) -> list[RegressionResult]:
        """The slices by tag that have enough cases."""
        found = (self.tagged(tag) for tag in self.tags)
        return [part for part in found if part and part.total >= self.slice_cases]

    @property
    def worst_slice(self) -> float | None:
        """The lowest pass rate of a slice."""
        return min((part.pass_rate for part in self.slices()), default=None)

    @property
    def worst_slice_difference(self) -> float | None:
        """The lowest difference of a slice to the baseline's pass rate on it."""
        return min((part.difference for part in self.slices()), default=None)


@dataclass(frozen=True)
class Slice:
    """Regression cases with one tag, or all (tag None): rates with 95% intervals.

    p_value: McNemar's exact test, two-sided, of broken against fixed.
    """

    tag: str | None
    total: int
    passed: int
    baseline_passed: int
    broken: int
    fixed: int
    pass_rate: Interval
    difference: Interval
    p_value: float


@dataclass(frozen=True)
class Quality:
    """How an artifact predicts and answers, against the baseline on the same inputs.

    intervals: of the metrics that have one, by name, at 95%; slices: all cases, then each tag.
    """

    perplexity: Perplexity
    kl_divergence: KlDivergence | None
    top1_agreement: float | None
    regression: RegressionResult | None
    dtype: str
    rows: int
    sequence_length: int
    row_sums: RowSums | None = None
    intervals: dict[str, Interval] = field(default_factory=dict)
    slices: tuple[Slice, ...] = ()
    harness: HarnessResult | None = None

    def metric(self, name: str) -> float | None:
        """A metric by the dotted name that gates use; None when it wasn't measured."""
        if name.startswith(HARNESS):
            return self.harness.metric(name.removeprefix(HARNESS)) if self.harness else None
        value: Any = self
        tag, name = split_tag(name)
        if tag is not None:
            value = self.regression and self.regression.tagged(tag)
        for part in name.split("."):
            value = getattr(value, part, None)
        return float(value) if isinstance(value, (int, float)) else None

    def to_json(self) -> dict[str, Any]:
        result = asdict(self)
        if self.regression is not None:
            names = ("total", "baseline_passed", *REGRESSION_METRICS)
            figures = {name: getattr(self.regression, name) for name in names}
            result["regression"] = figures | result["regression"]
        if self.harness is not None:
            result["harness"] = self.harness.to_json()
        return result


@dataclass(frozen=True)
class Cost:
    """What running it takes, measured in a fresh process.

    weights_bytes: parameters as the engine holds them; resident_bytes after loading and
    peak_bytes at the end, of the whole process; rates in tokens a second, medians of ``repeats``;
    ttft_ms: time to the first token of a ``prompt_tokens`` prompt; tpot_ms: time for each
    further token at batch 1. A figure that the engine can't give is None, and ``missing`` says why.
    """

    engine: str
    device: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    weights_bytes: int | None = None
    resident_bytes: int | None = None
    peak_bytes: int | None = None
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    decode_tokens_per_second_batch8: float | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Qualities:
    """What judging gives: the baseline, its own dtype against float32, and each artifact.

    base: the baseline without its adapters, where it has some; remarks: what to know of them all.
    """

    baseline: Quality
    noise_floor: Quality
    base: Quality | None
    artifacts: tuple[Quality, ...]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Costs:
    """What measuring gives: the baseline, its BF16 GGUF, and each artifact."""

    baseline: Cost | None
    baseline_gguf: Cost | None
    artifacts: tuple[Cost, ...]


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
