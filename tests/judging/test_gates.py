"""Gates and verdicts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from quantkit.judging.gates import apply_gate
from quantkit.judging.intervals import with_intervals
from quantkit.judging.variants import apply_gates
from quantkit.recipes.suite import Gate
from quantkit.reports.cells import notes
from quantkit.results.verdict import Verdict
from tests.helpers.present import present
from tests.helpers.variants import SPREAD, comparison, over_rows, quality, variant


@pytest.mark.parametrize(
    ("gate", "verdict"),
    [
        ({"metric": "kl_divergence.mean", "max": 0.01}, "PASS"),  # the bound itself passes
        ({"metric": "kl_divergence.mean", "max": 0.00999}, "FAIL"),
        ({"metric": "top1_agreement", "min": 0.97}, "PASS"),
        ({"metric": "top1_agreement", "min": 0.98}, "FAIL"),
        ({"metric": "regression.pass_rate", "min": 1.0}, "PASS"),
        ({"metric": "perplexity.ratio", "min": 1.0, "max": 1.005}, "FAIL"),
    ],
)
def test_gates(gate: dict[str, Any], verdict: str) -> None:
    decided = apply_gates(variant(), [Gate(**gate)])
    assert decided.verdict == Verdict(verdict)
    assert decided.gates[0].passed == (verdict == "PASS")


def test_one_failed_gate_fails_all_of_it() -> None:
    gates = [Gate(metric="kl_divergence.mean", max=1), Gate(metric="regression.broken", max=0)]
    decided = apply_gates(variant(quality=quality(broken=1)), gates)
    assert decided.verdict is Verdict.FAIL
    assert [gate.passed for gate in decided.gates] == [True, False]


def test_a_metric_that_was_not_measured_fails() -> None:
    quality_without = replace(quality(), regression=None)
    decided = apply_gates(
        variant(quality=quality_without), [Gate(metric="regression.broken_critical", max=0)]
    )
    assert decided.verdict is Verdict.FAIL and decided.gates[0].value is None


def test_nothing_is_rounded_before_a_comparison() -> None:
    gates = [Gate(metric="kl_divergence.mean", max=0.02)]
    assert apply_gates(variant(quality=quality(kl=0.02 + 1e-12)), gates).verdict is Verdict.FAIL


@pytest.mark.parametrize(
    ("bound", "verdict"),
    [
        ({"max": 0.012}, "PASS"),
        ({"max": 0.0105}, "INCONCLUSIVE"),
        ({"max": 0.0095}, "INCONCLUSIVE"),
        ({"max": 0.008}, "FAIL"),
        ({"min": 0.008}, "PASS"),
        ({"min": 0.012}, "FAIL"),
        ({"min": 0.008, "max": 0.012}, "PASS"),
        ({"min": 0.0098, "max": 0.0102}, "INCONCLUSIVE"),
        ({"min": 0.02, "max": 0.03}, "FAIL"),
    ],
)
def test_with_confidence_the_whole_interval_decides(bound: dict[str, Any], verdict: str) -> None:
    gate = Gate(metric="kl_divergence.mean", confidence=0.95, **bound)
    outcome = apply_gate(gate, over_rows(SPREAD))
    assert outcome.verdict == Verdict(verdict)
    found = present(outcome.interval)
    assert found.low < present(outcome.value) < found.high and found.confidence == 0.95
    assert (found.samples, found.unit, found.kind) == (64, "rows", "bootstrap-t")
    assert (outcome.more is not None) == (verdict == "INCONCLUSIVE")


def test_an_end_on_the_bound_is_inside() -> None:
    end = apply_gate(Gate(metric="kl_divergence.mean", max=1, confidence=0.95), over_rows(SPREAD))
    bound = present(end.interval).high
    for most, verdict in ((bound, "PASS"), (bound * (1 - 1e-12), "INCONCLUSIVE")):
        gate = Gate(metric="kl_divergence.mean", max=most, confidence=0.95)
        assert apply_gate(gate, over_rows(SPREAD)).verdict == Verdict(verdict)


@pytest.mark.parametrize(("most", "verdict"), [(0.0104, "PASS"), (0.0095, "FAIL")])
def test_so_many_more_rows_would_decide(most: float, verdict: str) -> None:
    gate = Gate(metric="kl_divergence.mean", max=most, confidence=0.95)
    outcome = apply_gate(gate, over_rows(SPREAD))
    needed = 64 + present(outcome.more)
    assert 64 < needed < 1000
    more = [SPREAD[i % 64] for i in range(math.ceil(1.1 * needed / 64) * 64)]
    assert apply_gate(gate, over_rows(more)).verdict == Verdict(verdict)
    fewer = [SPREAD[i % 64] for i in range(int(0.6 * needed / 64) * 64 or 64)]
    assert apply_gate(gate, over_rows(fewer)).verdict is Verdict.INCONCLUSIVE


def test_a_figure_on_its_bound_is_decided_by_no_number() -> None:
    even = over_rows([0.25, 0.75] * 32)
    outcome = apply_gate(Gate(metric="kl_divergence.mean", max=0.5, confidence=0.95), even)
    assert outcome.verdict is Verdict.INCONCLUSIVE and outcome.more is None
    row = apply_gates(
        variant(quality=even), [Gate(metric="kl_divergence.mean", max=0.5, confidence=0.9)]
    )
    said = notes(replace(comparison(), variants=(row,)))
    assert any("is on the bound" in line for line in said)


def test_a_fail_outweighs_inconclusive_and_that_outweighs_pass() -> None:
    good = Gate(metric="kl_divergence.mean", max=0.02, confidence=0.95)
    near = Gate(metric="kl_divergence.mean", max=0.0102, confidence=0.95)
    bad = Gate(metric="top1_agreement", min=0.99)
    row = variant(quality=over_rows(SPREAD))
    assert apply_gates(row, [good]).verdict is Verdict.PASS
    assert apply_gates(row, [good, near]).verdict is Verdict.INCONCLUSIVE
    assert apply_gates(row, [near, bad, good]).verdict is Verdict.FAIL
    assert Verdict.over([Verdict.PASS, Verdict.INCONCLUSIVE, Verdict.FAIL]) is Verdict.FAIL


def test_confidence_in_what_was_not_measured_fails() -> None:
    gates = [
        Gate(metric="regression.difference", min=-1, confidence=0.95),
        Gate(metric="regression.tags.sums.pass_rate", min=0, confidence=0.95),
        Gate(metric="regression.worst_slice", min=0, confidence=0.95),
    ]
    for given in (replace(quality(), regression=None), None):
        assert not any(
            outcome.passed for outcome in apply_gates(variant(quality=given), gates).gates
        )
    untagged = apply_gates(variant(), gates).gates
    assert [outcome.passed for outcome in untagged] == [True, False, False]


@pytest.mark.parametrize("figure", [math.nan, math.inf])
@pytest.mark.parametrize("confidence", [None, 0.95])
@pytest.mark.filterwarnings("error")
def test_what_is_not_finite_fails(figure: float, confidence: float | None) -> None:
    broken = with_intervals(over_rows([figure, *SPREAD]))
    assert "kl_divergence.mean" not in broken.intervals and "perplexity.ratio" in broken.intervals
    for bound in ({"min": 0.0}, {"max": 1.0}):
        gate = Gate(metric="kl_divergence.mean", confidence=confidence, **bound)
        assert apply_gate(gate, broken).verdict is Verdict.FAIL
