"""What was measured and decided, as frozen dataclasses that become JSON.

Numbers keep full precision here; they are rounded only where they are printed.
"""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass, field
from typing import Any


class Verdict(enum.StrEnum):
    """What the gates say."""

    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"


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
    """Cases that pass, and how that differs from the baseline's."""

    cases: tuple[CaseOutcome, ...]

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


@dataclass(frozen=True)
class SampleOutcome:
    """One sample of a harness task on either side; 1 where ``metric`` calls it right.

    doc_hash: of the document, by lm-eval; response: JSON, as filtered by the task.
    """

    doc_id: int
    doc_hash: str
    metric: str
    value: float
    baseline_value: float
    response: str
    baseline_response: str


@dataclass(frozen=True)
class TaskResult:
    """A task or group of lm-evaluation-harness: its metrics on either side, by lm-eval's names.

    samples: none for a group, or where no sample is right or wrong.
    """

    task: str
    version: str
    metrics: dict[str, float]
    baseline_metrics: dict[str, float]
    samples: tuple[SampleOutcome, ...]

    @property
    def broken(self) -> int:
        """Samples that the baseline gets right, and this doesn't."""
        return sum(sample.value < sample.baseline_value for sample in self.samples)

    @property
    def fixed(self) -> int:
        """Samples that the baseline gets wrong, and this doesn't."""
        return sum(sample.value > sample.baseline_value for sample in self.samples)

    def metric(self, name: str) -> float | None:
        if name in ("broken", "fixed"):
            return float(getattr(self, name)) if self.samples else None
        return self.metrics.get(name)


@dataclass(frozen=True)
class HarnessResult:
    """Tasks of lm-evaluation-harness."""

    tasks: tuple[TaskResult, ...]

    def metric(self, name: str) -> float | None:
        """A metric by ``TASK.METRIC``; None when it wasn't measured."""
        for task in self.tasks:
            if name.startswith(f"{task.task}."):
                value = task.metric(name.removeprefix(f"{task.task}."))
                if value is not None:
                    return value
        return None


_COUNTS = (
    "passed",
    "total",
    "pass_rate",
    "weighted_pass_rate",
    "broken",
    "broken_critical",
    "fixed",
)


@dataclass(frozen=True)
class Quality:
    """How an artifact predicts and answers, against the baseline on the same inputs."""

    perplexity: Perplexity
    kl_divergence: KlDivergence | None
    top1_agreement: float | None
    regression: RegressionResult | None
    dtype: str
    rows: int
    sequence_length: int
    harness: HarnessResult | None = None

    def metric(self, name: str) -> float | None:
        """A metric by the dotted name that gates use; None when it wasn't measured."""
        if name.startswith("harness."):
            task_metric = name.removeprefix("harness.")
            return None if self.harness is None else self.harness.metric(task_metric)
        value: Any = self
        for part in name.split("."):
            value = getattr(value, part, None)
        return float(value) if isinstance(value, (int, float)) else None

    def to_json(self) -> dict[str, Any]:
        result = asdict(self)
        if self.regression is not None:
            result["regression"] = {name: getattr(self.regression, name) for name in _COUNTS} | {
                "cases": [asdict(case) for case in self.regression.cases]
            }
        if self.harness is not None:
            result["harness"] = [
                {**asdict(task), "broken": task.metric("broken"), "fixed": task.metric("fixed")}
                for task in self.harness.tasks
            ]
        return result


METRICS = (
    "perplexity.value",
    "perplexity.ratio",
    "kl_divergence.mean",
    "kl_divergence.high",
    "kl_divergence.p99",
    "top1_agreement",
    "regression.passed",
    "regression.pass_rate",
    "regression.weighted_pass_rate",
    "regression.broken",
    "regression.broken_critical",
    "regression.fixed",
)


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
    """One gate: the bound, what was measured, and whether it holds."""

    metric: str
    value: float | None
    min: float | None
    max: float | None
    passed: bool


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

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "quality": self.quality.to_json() if self.quality else None}


@dataclass(frozen=True)
class Comparison:
    """The whole table, what differs between its rows, and the verdict over all."""

    suite: str | None
    baseline: Variant
    references: tuple[Variant, ...]  # the noise floor; the baseline in another engine
    variants: tuple[Variant, ...]
    differences: tuple[str, ...]
    way_back: str
    verdict: Verdict | None

    @property
    def models(self) -> tuple[Variant, ...]:
        """All rows."""
        return (self.baseline, *self.references, *self.variants)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "suite": self.suite,
            "verdict": self.verdict,
            "baseline": self.baseline.to_json(),
            "references": [reference.to_json() for reference in self.references],
            "variants": [variant.to_json() for variant in self.variants],
            "differences": list(self.differences),
            "way_back": self.way_back,
        }
