"""How well an artifact predicts text and answers cases, and how certain each figure is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from quantkit.results.harness import HarnessResult
from quantkit.results.metrics import HARNESS, KL_ENDS, KL_MEAN, REGRESSION_METRICS, split_tag
from quantkit.results.regression import RegressionResult


@dataclass(frozen=True)
class Interval:
    """A two-sided confidence interval of a metric.

    confidence: 0.95 leaves 2.5% beyond either end; kind: the method that made it; samples: how
    many independent rows, cases or samples (``unit``) it rests on.
    """

    low: float
    high: float
    confidence: float
    kind: str
    samples: int
    unit: str


@dataclass(frozen=True)
class RowSums:
    """Sums over the predicted tokens of each row of likelihood text; one entry a row.

    tokens: how many were predicted; nll, baseline_nll: negative log-likelihoods of the true
    tokens, in nats; kl: KL(baseline ‖ variant), in nats; agreed: tokens where both models rank the
    same token first; experts_changed: shares of the layers with experts that give a token others,
    None for models without. Every interval over rows can be computed again from these.
    """

    tokens: tuple[int, ...]
    nll: tuple[float, ...]
    baseline_nll: tuple[float, ...]
    kl: tuple[float, ...]
    agreed: tuple[int, ...]
    experts_changed: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of a token.

    stderr: standard error, with rows as the independent units; ratio: to the baseline's
    perplexity, None for the baseline itself.
    """

    value: float
    stderr: float
    ratio: float | None = None


@dataclass(frozen=True)
class KlDivergence:
    """KL(baseline ‖ variant) of the predicted distributions, in nats: mean and 99th percentile
    over tokens. The mean's interval is ``Quality.kl_interval``."""

    mean: float
    p99: float


@dataclass(frozen=True)
class ExpertsChanged:
    """How many tokens are sent to other experts than in the baseline, as shares from 0 to 1.

    A token counts where at least one of its experts is another; the order among them doesn't.
    mean: over all layers with experts; layers: by the number of the layer.
    """

    mean: float
    layers: dict[str, float]

    @property
    def worst(self) -> float:
        """Of the layer with the most."""
        return max(self.layers.values())


@dataclass(frozen=True)
class Slice:
    """Regression cases with one tag, or all of them (tag None), with 95% intervals of the rates.

    broken: cases that only the baseline passes; fixed: cases that only the variant passes;
    p_value: of McNemar's exact two-sided test that both are equally likely.
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
    """How a model predicts and answers, compared with the baseline on the same inputs.

    dtype: in which it computed; rows and sequence_length: the likelihood text's shape in tokens;
    beginning: the tokens that every row begins with, None where the suite didn't ask for any;
    intervals: the 95% interval of each metric that has one, by the metric's name; slices: all
    cases, then those of each tag; experts_changed: None for models without experts.
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
    beginning: tuple[str, ...] | None = None
    experts_changed: ExpertsChanged | None = None

    @property
    def kl_interval(self) -> Interval | None:
        """The 95% interval of the mean KL divergence."""
        return self.intervals.get(KL_MEAN)

    def metric(self, name: str) -> float | None:
        """A metric by the dotted name that gates use; None when it wasn't measured."""
        if name.startswith(HARNESS):
            return self.harness.metric(name.removeprefix(HARNESS)) if self.harness else None
        if name in KL_ENDS:
            return getattr(self.kl_interval, KL_ENDS[name], None)
        value: Any = self
        tag, name = split_tag(name)
        if tag is not None:
            value = self.regression and self.regression.tagged(tag)
        for part in name.split("."):
            value = getattr(value, part, None)
        return float(value) if isinstance(value, (int, float)) else None

    def to_json(self) -> dict[str, Any]:
        """All fields, and beside them the figures that follow from them."""
        result = asdict(self)
        if self.beginning is None:
            del result["beginning"]
        if self.experts_changed is None:
            del result["experts_changed"]
            if self.row_sums is not None:
                del result["row_sums"]["experts_changed"]
        else:
            result["experts_changed"]["worst"] = self.experts_changed.worst
        if self.kl_divergence is not None:
            ends = {end: self.metric(name) for name, end in KL_ENDS.items()}
            result["kl_divergence"] |= ends
        if self.regression is not None:
            names = ("total", "baseline_passed", *REGRESSION_METRICS)
            figures = {name: getattr(self.regression, name) for name in names}
            result["regression"] = figures | result["regression"]
        if self.harness is not None:
            result["harness"] = self.harness.to_json()
        return result


@dataclass(frozen=True)
class Qualities:
    """The qualities of all the models that one suite has judged together.

    noise_floor: the baseline in its own dtype compared with itself in float32; base: the baseline
    without its adapters, None where it has none; remarks: sentences that a reader of all these
    figures should know.
    """

    baseline: Quality
    noise_floor: Quality
    base: Quality | None
    artifacts: tuple[Quality, ...]
    remarks: tuple[str, ...] = ()
