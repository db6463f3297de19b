"""How well an artifact predicts and answers, and how certain each figure is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from quantkit.results.harness import HarnessResult
from quantkit.results.metrics import HARNESS, REGRESSION_METRICS, split_tag
from quantkit.results.regression import RegressionResult


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
class Qualities:
    """What judging gives: the baseline, its own dtype against float32, and each artifact.

    base: the baseline without its adapters, where it has some; remarks: what to know of them all.
    """

    baseline: Quality
    noise_floor: Quality
    base: Quality | None
    artifacts: tuple[Quality, ...]
    remarks: tuple[str, ...] = ()
