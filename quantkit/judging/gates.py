"""Gates: the bounds that a suite sets for what was measured."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from quantkit.base.errors import InputError
from quantkit.judging.cases import Case
from quantkit.judging.intervals import metric_interval
from quantkit.recipes.suite import Gate, Suite
from quantkit.results.metrics import EXPERTS, split_tag
from quantkit.results.quality import Interval, Quality
from quantkit.results.verdict import GateOutcome, Verdict


def check_slices(suite: Suite, cases: Sequence[Case]) -> None:
    """Raise InputError for a gate on a slice that the cases don't have."""
    sizes = Counter(tag for case in cases for tag in set(case.tags))
    least = suite.regression.slice_cases if suite.regression else 1
    for number, gate in enumerate(suite.gates):
        tag, name = split_tag(gate.metric)
        if tag is not None and tag not in sizes:
            raise InputError(
                f"no case has the tag {tag}",
                where=f"gates.{number}",
                fix=f"The cases' tags are {', '.join(sorted(sizes))}."
                if sizes
                else "No case has a tag.",
            )
        if "worst_slice" in name and max(sizes.values(), default=0) < least:
            raise InputError(
                f"no tag has {least} cases, so there is no slice to be the worst",
                where=f"gates.{number}",
                fix="Give cases tags, or set regression.slice_cases lower.",
            )


def check_measured(suite: Suite, *, experts: bool) -> None:
    """Raise InputError for a gate on experts where the model has none (``experts``)."""
    for number, gate in enumerate(suite.gates):
        if gate.metric.startswith(EXPERTS) and not experts:
            raise InputError(
                f"a gate on {gate.metric}, but the model has no experts",
                where=f"gates.{number}",
                fix="Leave it out, or judge a mixture of experts.",
            )


def apply_gate(gate: Gate, quality: Quality | None) -> GateOutcome:
    """Compare what was measured with a gate's bounds, which are inclusive; nothing is rounded.

    Without ``confidence`` the metric's value decides. With it the metric's interval does: PASS
    where all of it is within the bounds, FAIL where all of it is outside, INCONCLUSIVE where it
    holds a bound. A metric that wasn't measured, isn't finite, or lacks the interval is a FAIL.
    """
    value = quality.metric(gate.metric) if quality else None
    interval = None
    if quality is not None and gate.confidence is not None:
        interval = metric_interval(quality, gate.metric, gate.confidence)
    outcome = GateOutcome(
        metric=gate.metric,
        value=value,
        min=gate.min,
        max=gate.max,
        verdict=Verdict.FAIL,
        confidence=gate.confidence,
    )
    if value is None or not math.isfinite(value) or (gate.confidence and interval is None):
        return outcome
    low, high = (interval.low, interval.high) if interval else (value, value)
    least = -math.inf if gate.min is None else gate.min
    most = math.inf if gate.max is None else gate.max
    more = None
    if least <= low and high <= most:
        verdict = Verdict.PASS
    elif high < least or most < low:
        verdict = Verdict.FAIL
    else:
        verdict = Verdict.INCONCLUSIVE
        more = _more_samples(value, interval, (least, most)) if interval else None
    return replace(outcome, verdict=verdict, interval=interval, more=more)


def _more_samples(value: float, interval: Interval, bounds: tuple[float, float]) -> int | None:
    """About how many further samples would decide the gate, if the value stays as it is.

    None for a value on a bound, which no number decides.
    """
    factor = 1.0
    for bound in bounds:
        if interval.low < bound < interval.high:
            if value == bound:
                return None
            # An interval's width falls with the square root of the samples.
            width = interval.high - value if value < bound else value - interval.low
            factor = max(factor, (width / (bound - value)) ** 2)
    return max(math.ceil(interval.samples * (factor - 1)), 1)
