"""The names of what is measured, by which gates bound it."""

from __future__ import annotations

# Of all cases, or of a slice as regression.tags.TAG.NAME.
SLICE_METRICS = ("passed", "pass_rate", "difference", "broken", "broken_critical", "fixed")
REGRESSION_METRICS = (
    *SLICE_METRICS,
    "weighted_pass_rate",
    "worst_slice",
    "worst_slice_difference",
)
METRICS = (
    "perplexity.value",
    "perplexity.ratio",
    "kl_divergence.mean",
    "kl_divergence.high",
    "kl_divergence.p99",
    "top1_agreement",
    *(f"regression.{name}" for name in REGRESSION_METRICS),
)
# Those of which an interval can be given, so that a gate may ask for confidence.
INTERVAL_METRICS = (
    "perplexity.value",
    "perplexity.ratio",
    "kl_divergence.mean",
    "top1_agreement",
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
    """Whether a gate may name it. What a harness task measures, only lm-eval knows."""
    if name.startswith(HARNESS):
        return "." in name.removeprefix(HARNESS)
    tag, rest = split_tag(name)
    return rest in (METRICS if tag is None else SLICE_METRICS)


def has_interval(name: str) -> bool:
    """Whether a gate on it may ask for confidence."""
    if name.startswith(HARNESS):
        return name.endswith(".difference")
    tag, rest = split_tag(name)
    return rest in (INTERVAL_METRICS if tag is None else _SLICE_INTERVALS)
