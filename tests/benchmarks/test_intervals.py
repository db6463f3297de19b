"""Every kind of interval holds the mean; the better ones cover more of what is drawn."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import intervals
from quantkit.judging.significance import mean_interval

ROWS = np.random.default_rng(0).exponential(size=(20, 32))


def test_every_interval_holds_the_mean_of_its_rows() -> None:
    for kind, (low, high) in intervals.intervals(ROWS).items():
        assert low.shape == high.shape == (20,), kind
        assert (low < ROWS.mean(1)).all() and (ROWS.mean(1) < high).all(), kind


def test_students_is_wider_than_the_normal_one() -> None:
    by_kind = intervals.intervals(ROWS)
    widths = {kind: (high - low).mean() for kind, (low, high) in by_kind.items()}
    assert widths["Student's t"] > widths["mean ± 1.96 standard errors"]


def test_ours_is_the_one_that_gates_use() -> None:
    low, high = intervals.intervals(ROWS)["QuantKit's"]
    expected = mean_interval(ROWS, np.ones(32))
    assert np.array_equal(low, expected[0]) and np.array_equal(high, expected[1])


def test_shares_are_percentages_of_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = 0.5
    values = np.array([0.0, 1.0])

    def fixed(drawn: intervals.Array) -> dict[str, intervals.Ends]:
        draws = len(drawn)
        below = np.arange(draws) % 4 == 0  # one interval in four ends below the truth
        return {"fixed": (np.zeros(draws), np.where(below, truth - 0.1, truth + 0.1))}

    monkeypatch.setattr(intervals, "intervals", fixed)
    monkeypatch.setattr(intervals, "AT_ONCE", 100)
    assert intervals.covered(values, 8, 400) == {"fixed": "75.0 (25.0)"}
