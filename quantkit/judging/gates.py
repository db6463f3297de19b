"""Gates: what was measured, held against a suite's bounds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from quantkit.base.errors import InputError
from quantkit.judging.intervals import interval
from quantkit.judging.regression import Case
from quantkit.recipes.suite import Gate, Suite
from quantkit.results.metrics import split_tag
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
                fix=f"Tags: {', '.join(sorted(sizes))}." if sizes else "No case has tags.",
            )
        if "worst_slice" in name and max(sizes.values(), default=0) < least:
            raise InputError(
                f"no tag has {least} cases, so there is no slice to look at",
                where=f"gates.{number}",
                fix="Give cases tags, or set regression.slice_cases lower.",
            )


def hold(gate: Gate, quality: Quality | None) -> GateOutcome:
    """Hold a quality against one gate; bounds are inclusive and nothing is rounded.

    Without ``confidence`` the figure is compared. With it PASS means that the whole interval lies
    within the bounds, FAIL that all of it lies outside, INCONCLUSIVE that it straddles one. A
    metric that wasn't measured fails, and so does one that isn't finite.
    """
    value = quality.metric(gate.metric) if quality else None
    found = None
    if quality is not None and gate.confidence is not None:
        found = interval(quality, gate.metric, gate.confidence)
    if value is None or not math.isfinite(value) or (gate.confidence and found is None):
        return GateOutcome(gate.metric, value, gate.min, gate.max, Verdict.FAIL, gate.confidence)
    low, high = (found.low, found.high) if found else (value, value)
    least = -math.inf if gate.min is None else gate.min
    most = math.inf if gate.max is None else gate.max
    more = None
    if least <= low and high <= most:
        verdict = Verdict.PASS
    elif high < least or most < low:
        verdict = Verdict.FAIL
    else:
        verdict = Verdict.INCONCLUSIVE
        more = _missing(value, found, (least, most)) if found else None
    return GateOutcome(
        gate.metric, value, gate.min, gate.max, verdict, gate.confidence, found, more
    )


def _missing(value: float, found: Interval, bounds: tuple[float, float]) -> int | None:
    """About how many further samples would decide, if the figure stays where it is.

    An interval's width falls with the square root of the samples. A figure on its bound is decided
    by none.
    """
    factor = 1.0
    for bound in bounds:
        if found.low < bound < found.high:
            if value == bound:
                return None
            width = found.high - value if value < bound else value - found.low
            factor = max(factor, (width / (bound - value)) ** 2)
    return max(math.ceil(found.samples * (factor - 1)), 1)
