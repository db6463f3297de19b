"""Confidence intervals of the metrics that gates name, from each row's and each case's figures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from quantkit.judging.significance import difference_interval, mcnemar, mean_interval, rate_interval
from quantkit.results.harness import HarnessResult
from quantkit.results.metrics import (
    EXPERTS_MEAN,
    HARNESS,
    INTERVAL_METRICS,
    KL_MEAN,
    split_tag,
)
from quantkit.results.quality import Interval, Quality, RowSums, Slice
from quantkit.results.regression import RegressionResult

_CONFIDENCE = 0.95  # of every interval that a result holds; a gate may ask for another


def metric_interval(quality: Quality, metric: str, confidence: float) -> Interval | None:
    """The interval of a metric by its name; None where it wasn't measured or can't have one."""
    if quality.metric(metric) is None:
        return None
    if metric.startswith(HARNESS):
        return _task_interval(quality.harness, metric.removeprefix(HARNESS), confidence)
    tag, name = split_tag(metric)
    cases = quality.regression
    if tag is not None:
        cases, name = cases and cases.tagged(tag), f"regression.{name}"
    if name.startswith("regression."):
        interval = _CASE_INTERVALS.get(name)
        return interval(cases, confidence) if interval and cases else None
    return _row_intervals(quality.row_sums, confidence).get(name) if quality.row_sums else None


def with_intervals(quality: Quality) -> Quality:
    """``quality`` with the 95% intervals of its metrics, and with its slices."""
    of_rows = _row_intervals(quality.row_sums, _CONFIDENCE) if quality.row_sums else {}
    intervals = {}
    for name in INTERVAL_METRICS:
        interval = of_rows.get(name) or metric_interval(quality, name, _CONFIDENCE)
        if interval is not None and quality.metric(name) is not None:
            intervals[name] = interval
    return replace(quality, intervals=intervals, slices=_slices(quality.regression))


def _row_intervals(sums: RowSums, confidence: float) -> dict[str, Interval]:
    """Intervals of the metrics that are means over tokens, all from the same resamples.

    An interval with an end that isn't finite is left out.
    """
    nll, baseline = np.asarray(sums.nll), np.asarray(sums.baseline_nll)
    figures = [nll, nll - baseline, np.asarray(sums.kl), np.asarray(sums.agreed)]
    if sums.experts_changed is not None:
        figures.append(np.asarray(sums.experts_changed))
    lows, highs = mean_interval(np.stack(figures), sums.tokens, confidence)
    intervals = {}
    # The last is of mixtures of experts alone.
    for (name, scale), low, high in zip(_ROW_METRICS.items(), lows, highs, strict=False):
        ends = scale(float(low)), scale(float(high))
        if all(map(math.isfinite, ends)):
            intervals[name] = Interval(*ends, confidence, "bootstrap-t", len(sums.tokens), "rows")
    return intervals


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf  # where math.exp would overflow


# The function from a mean over tokens to the metric, in the order of _row_intervals' figures. A
# bootstrap's end may lie outside what the metric can be.
_ROW_METRICS: dict[str, Callable[[float], float]] = {
    "perplexity.value": _exp,
    "perplexity.ratio": _exp,
    KL_MEAN: lambda mean: max(mean, 0.0),
    "top1_agreement": lambda mean: min(max(mean, 0.0), 1.0),
    EXPERTS_MEAN: lambda mean: min(max(mean, 0.0), 1.0),
}


def _pass_rate(cases: RegressionResult, confidence: float) -> Interval:
    ends = rate_interval(cases.passed, cases.total, confidence)
    return Interval(*ends, confidence, "Clopper-Pearson", cases.total, "cases")


def _difference(cases: RegressionResult, confidence: float) -> Interval:
    ends = difference_interval(cases.fixed, cases.broken, cases.total, confidence)
    return Interval(*ends, confidence, "Tango", cases.total, "cases")


def _task_interval(harness: HarnessResult | None, name: str, confidence: float) -> Interval | None:
    """The interval of a harness task's ``difference``; other metrics have none."""
    task, metric = (harness and harness.split(name)) or (None, "")
    if task is None or metric != "difference":
        return None
    total = len(task.samples)
    ends = difference_interval(task.fixed, task.broken, total, confidence)
    return Interval(*ends, confidence, "Tango", total, "samples")


def _worst(
    interval: Callable[[RegressionResult, float], Interval],
) -> Callable[[RegressionResult, float], Interval | None]:
    """The interval of the lowest of all slices' true figures, from the interval of one slice."""

    def of(cases: RegressionResult, confidence: float) -> Interval | None:
        parts = cases.slices()
        if not parts:
            return None
        # The lower end is mistaken only if that of the truly worst slice is, so each slice's lower
        # end needs no more confidence than was asked for. The upper end is mistaken as soon as any
        # slice's is, so the slices share that risk (Bonferroni).
        worst = min((interval(part, confidence) for part in parts), key=lambda each: each.low)
        shared = 1 - (1 - confidence) / len(parts)
        high = min(interval(part, shared).high for part in parts)
        return replace(worst, high=high, kind=f"{worst.kind}, lowest of {len(parts)} slices")

    return of


_CASE_INTERVALS: dict[str, Callable[[RegressionResult, float], Interval | None]] = {
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
            tag=tag,
            total=part.total,
            passed=part.passed,
            baseline_passed=part.baseline_passed,
            broken=part.broken,
            fixed=part.fixed,
            pass_rate=_pass_rate(part, _CONFIDENCE),
            difference=_difference(part, _CONFIDENCE),
            p_value=mcnemar(part.broken, part.fixed),
        )
        for tag, part in parts
        if part
    )
