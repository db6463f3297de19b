"""Intervals of the metrics that gates name, from what was kept of each row and each case."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from quantkit.judging.significance import difference_interval, mcnemar, mean_interval, rate_interval
from quantkit.results.harness import HarnessResult
from quantkit.results.metrics import HARNESS, INTERVAL_METRICS, split_tag
from quantkit.results.quality import Interval, Quality, RowSums, Slice
from quantkit.results.regression import RegressionResult

_LEVEL = 0.95


def interval(quality: Quality, metric: str, confidence: float) -> Interval | None:
    """The interval of a metric by name; None where it wasn't measured or can have none."""
    if quality.metric(metric) is None:
        return None
    if metric.startswith(HARNESS):
        return _of_task(quality.harness, metric.removeprefix(HARNESS), confidence)
    tag, name = split_tag(metric)
    cases = quality.regression
    if tag is not None:
        cases, name = cases and cases.tagged(tag), f"regression.{name}"
    if name.startswith("regression."):
        make = _OVER_CASES.get(name)
        return make(cases, confidence) if make and cases else None
    return _over_rows(quality.row_sums, confidence).get(name) if quality.row_sums else None


def with_intervals(quality: Quality) -> Quality:
    """The same quality with its 95% intervals and its slices."""
    rows = _over_rows(quality.row_sums, _LEVEL) if quality.row_sums else {}
    found = {}
    for name in INTERVAL_METRICS:
        value = rows.get(name) if name in rows else interval(quality, name, _LEVEL)
        if value is not None and quality.metric(name) is not None:
            found[name] = value
    return replace(quality, intervals=found, slices=_slices(quality.regression))


def _over_rows(sums: RowSums, confidence: float) -> dict[str, Interval]:
    """Intervals of the figures a token; the same resamples serve all of them."""
    nll, baseline = np.asarray(sums.nll), np.asarray(sums.baseline_nll)
    figures = np.stack([nll, nll - baseline, np.asarray(sums.kl), np.asarray(sums.agreed)])
    low, high = mean_interval(figures, sums.tokens, confidence)
    count = len(sums.tokens)
    found = {}
    for (name, scale), *ends in zip(_OVER_ROWS.items(), low, high, strict=True):
        least, most = (scale(float(end)) for end in ends)
        if math.isfinite(least) and math.isfinite(most):
            found[name] = Interval(least, most, confidence, "bootstrap-t", count, "rows")
    return found


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


# From a mean over tokens to the metric, in the order of the figures above.
_OVER_ROWS: dict[str, Callable[[float], float]] = {
    "perplexity.value": _exp,
    "perplexity.ratio": _exp,
    "kl_divergence.mean": lambda mean: max(mean, 0.0),
    "top1_agreement": lambda mean: min(max(mean, 0.0), 1.0),
}


def _pass_rate(cases: RegressionResult, confidence: float) -> Interval:
    ends = rate_interval(cases.passed, cases.total, confidence)
    return Interval(*ends, confidence, "Clopper-Pearson", cases.total, "cases")


def _difference(cases: RegressionResult, confidence: float) -> Interval:
    ends = difference_interval(cases.fixed, cases.broken, cases.total, confidence)
    return Interval(*ends, confidence, "Tango", cases.total, "cases")


def _of_task(harness: HarnessResult | None, name: str, confidence: float) -> Interval | None:
    """The interval of a harness task's ``difference``; other metrics have none."""
    task, metric = (harness and harness.find(name)) or (None, "")
    if task is None or metric != "difference":
        return None
    total = len(task.samples)
    ends = difference_interval(task.fixed, task.broken, total, confidence)
    return Interval(*ends, confidence, "Tango", total, "samples")


def _worst(
    make: Callable[[RegressionResult, float], Interval],
) -> Callable[[RegressionResult, float], Interval | None]:
    """The interval of the lowest of all slices' true figures.

    Its lower end errs only if that of the truly worst slice does, so no slice needs more confidence
    than asked for. Its upper end errs as soon as one of them does: those share the risk
    (Bonferroni).
    """

    def of(cases: RegressionResult, confidence: float) -> Interval | None:
        parts = cases.slices()
        if not parts:
            return None
        worst = min((make(part, confidence) for part in parts), key=lambda each: each.low)
        shared = 1 - (1 - confidence) / len(parts)
        high = min(make(part, shared).high for part in parts)
        return replace(worst, high=high, kind=f"{worst.kind}, lowest of {len(parts)} slices")

    return of


_OVER_CASES: dict[str, Callable[[RegressionResult, float], Interval | None]] = {
    "regression.pass_rate": _pass_rate,
    "regression.difference": _difference,
    "regression.worst_slice": _worst(_pass_rate),
    "regression.worst_slice_difference": _worst(_difference),
}


def _slices(cases: RegressionResult | None) -> tuple[Slice, ...]:
    """All cases together, then those of each tag."""
    if cases is None:
        return ()
    parts = [(None, cases), *((tag, cases.tagged(tag)) for tag in cases.tags)]
    return tuple(
        Slice(
            tag,
            part.total,
            part.passed,
            part.baseline_passed,
            part.broken,
            part.fixed,
            _pass_rate(part, _LEVEL),
            _difference(part, _LEVEL),
            mcnemar(part.broken, part.fixed),
        )
        for tag, part in parts
        if part
    )
