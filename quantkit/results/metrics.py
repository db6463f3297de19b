"""The names of what is measured, as gates bound them."""

from __future__ import annotations

# Of all cases, or of one tag's as regression.tags.TAG.NAME.
SLICE_METRICS = ("passed", "pass_rate", "difference", "broken", "broken_critical", "fixed")
REGRESSION_METRICS = (
    *SLICE_METRICS,
    "weighted_pass_rate",
    "worst_slice",
    "worst_slice_difference",
)
KL_MEAN = "kl_divergence.mean"
# The ends of the mean's 95% interval, as metrics of their own: the name, and which end it is.
KL_ENDS = {"kl_divergence.low": "low", "kl_divergence.high": "high"}
# Measured by likelihood alone, without any answer.
LIKELIHOOD_METRICS = (
    "perplexity.value",
    "perplexity.ratio",
    KL_MEAN,
    "kl_divergence.high",
    "kl_divergence.p99",
    "top1_agreement",
)
# Measured of mixtures of experts alone.
EXPERTS = "experts_changed."
EXPERTS_MEAN, EXPERTS_WORST = f"{EXPERTS}mean", f"{EXPERTS}worst"
EXPERT_METRICS = (EXPERTS_MEAN, EXPERTS_WORST)
METRICS = (
    *LIKELIHOOD_METRICS,
    *EXPERT_METRICS,
    *(f"regression.{name}" for name in REGRESSION_METRICS),
)
# The metrics that have an interval, so that a gate may ask for confidence.
INTERVAL_METRICS = (
    "perplexity.value",
    "perplexity.ratio",
    KL_MEAN,
    "top1_agreement",
    EXPERTS_MEAN,
    "regression.pass_rate",
    "regression.difference",
    "regression.worst_slice",
    "regression.worst_slice_difference",
)
_SLICE_INTERVALS = ("pass_rate", "difference")
_TAGS = "regression.tags."
HARNESS = "harness."


def split_tag(metric: str) -> tuple[str | None, str]:
    """``regression.tags.TAG.NAME`` as TAG and NAME; any other metric as None and itself."""
    tag, dot, name = metric.removeprefix(_TAGS).rpartition(".")
    return (tag, name) if metric.startswith(_TAGS) and dot else (None, metric)


def is_metric(name: str) -> bool:
    """Whether a gate may bound ``name``.

    Any name below ``harness.`` may be one: only lm-eval knows what its tasks measure.
    """
    if name.startswith(HARNESS):
        return "." in name.removeprefix(HARNESS)
    tag, rest = split_tag(name)
    return rest in (METRICS if tag is None else SLICE_METRICS)


def has_interval(name: str) -> bool:
    """Whether a gate on ``name`` may ask for confidence."""
    if name.startswith(HARNESS):
        return name.endswith(".difference")
    tag, rest = split_tag(name)
    return rest in (INTERVAL_METRICS if tag is None else _SLICE_INTERVALS)
