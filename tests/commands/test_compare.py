"""Gates and verdicts, and the table that shows them."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest

from quantkit.judging.gates import apply_gate
from quantkit.judging.intervals import with_intervals
from quantkit.judging.variants import apply_gates, differences
from quantkit.recipes.suite import Gate
from quantkit.reports.cells import notes, table
from quantkit.reports.details import details
from quantkit.reports.markdown import comparison_markdown
from quantkit.results.comparison import Comparison, Variant
from quantkit.results.cost import Cost
from quantkit.results.quality import KlDivergence, Perplexity, Quality, RowSums
from quantkit.results.regression import CaseOutcome, RegressionResult
from quantkit.results.verdict import Verdict
from tests.helpers.present import present


def quality(kl: float = 0.01, broken: int = 0) -> Quality:
    cases = tuple(
        CaseOutcome(f"c{i}", i >= broken, True, i == 0, (), "no|w", "before") for i in range(4)
    )
    return Quality(
        perplexity=Perplexity(10.0, 0.1, 1.01),
        kl_divergence=KlDivergence(mean=kl, p99=kl * 5),
        top1_agreement=0.97,
        regression=RegressionResult(cases),
        dtype="float32",
        rows=8,
        sequence_length=256,
    )


def variant(**changes: Any) -> Variant:
    fields: dict[str, Any] = {
        "name": "v",
        "path": "v",
        "recipe": "v 1.0.0",
        "method": "awq",
        "format": "awq",
        "bits_per_weight": 4.2,
        "disk_bytes": 10_000_000,
        "quality": quality(),
    }
    return Variant(**{**fields, **changes})


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


def over_rows(kl: list[float]) -> Quality:
    """A quality of rows of 100 tokens with these KL divergences a token."""
    count = len(kl)
    zeros = (0.0,) * count
    sums = RowSums((100,) * count, zeros, zeros, tuple(100 * x for x in kl), (100,) * count)
    mean = sum(kl) / count
    return replace(
        quality(), kl_divergence=KlDivergence(mean=mean, p99=1), rows=count, row_sums=sums
    )


SPREAD = [0.01 * (1 + 0.5 * math.sin(i)) for i in range(64)]  # mean 0.0100, ± 9%


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


def comparison() -> Comparison:
    cost = Cost("transformers", "cpu", 2, 128, 32, 3, missing={"decode": "no such kernel"})
    row = apply_gates(
        variant(quality=quality(broken=1), cost=cost), [Gate(metric="regression.broken", max=0)]
    )
    base = variant(name="BF16", recipe=None, method=None)
    return Comparison(
        "s 1.0.0", base, (), (row,), ("v: the weights only.",), "serve it", Verdict.FAIL
    )


def test_the_table_says_what_is_missing_broken_and_failed() -> None:
    said = "\n".join(notes(comparison()))
    assert "Missing: v, decode: no such kernel" in said
    assert "Broken: v, c0 (critical): 'before' became 'no|w'" in said
    assert "Failed: v, regression.broken is 1, allowed at most 0" in said
    assert "Differs: v: the weights only." in said and "Way back: serve it" in said
    grid = table(comparison().models)
    assert grid.headers == ("BF16", "v")
    labels = [row.label for section in grid.sections for row in section.rows]
    assert "decode ×1, tokens/s" not in labels  # measured for none of them


@pytest.mark.parametrize(("method", "what"), [("awq", "the weights"), ("fp8", "inputs of linears")])
def test_what_differs_names_the_inputs_where_they_are_rounded(method: str, what: str) -> None:
    (said,) = differences(variant(name="BF16"), [], [variant(method=method)])
    assert f"{what} only" in said


def test_markdown_is_made_of_well_formed_tables() -> None:
    text = comparison_markdown(comparison())
    tables = [part for part in text.split("\n\n") if part.startswith("|")]
    assert [part.count("\n") >= 2 for part in tables] == [True, True]  # figures, gates
    for part in tables:
        assert len({line.replace("\\|", "").count("|") for line in part.splitlines()}) == 1
    assert "no\\|w" in text


def test_details_show_intervals_slices_and_what_is_missing() -> None:
    cases = tuple(
        CaseOutcome(f"c{i}", i > 5, True, False, ("odd" if i % 2 else "even", "all"), "", "")
        for i in range(40)
    )
    given = with_intervals(replace(over_rows(SPREAD), regression=RegressionResult(cases)))
    gates = [
        Gate(metric="kl_divergence.mean", max=0.0102, confidence=0.95),
        Gate(metric="regression.tags.odd.pass_rate", min=0.5, confidence=0.95),
    ]
    row = apply_gates(variant(quality=given), gates)
    shown, slices = details(replace(comparison(), variants=(row,)))
    near, on_a_tag = shown.rows
    assert near[2] == "0.0100075" and near[3].endswith(" at 95%")
    assert near[4:6] == ("at most 0.0102", "INCONCLUSIVE")
    assert re.fullmatch(r"about [\d,]+ more rows", near[6])
    assert on_a_tag[2] == "0.85" and on_a_tag[4:] == ("at least 0.5", "PASS", "")
    assert [line[1] for line in slices.rows] == ["all cases", "even", "all", "odd"]
    everything, even = slices.rows[0], slices.rows[1]
    assert everything[2] == "34/40" and everything[4] == "-15.0%"
    assert everything[6:] == ("6 / 0", f"{2 / 2**6:.3f}")
    assert even[2] == "17/20" and even[6:] == ("3 / 0", "0.250")


def test_json_has_the_documented_fields() -> None:
    value = json.loads(json.dumps(comparison().to_json()))
    assert value["verdict"] == "FAIL" and value["baseline"]["name"] == "BF16"
    (row,) = value["variants"]
    for name in ("name", "recipe", "method", "format", "bits_per_weight", "disk_bytes", "verdict"):
        assert row[name] is not None
    assert {"value", "stderr", "ratio"} <= row["quality"]["perplexity"].keys()
    assert {"mean", "low", "high", "p99"} <= row["quality"]["kl_divergence"].keys()
    assert row["quality"]["top1_agreement"] == 0.97
    assert {"passed", "total", "broken", "fixed"} <= row["quality"]["regression"].keys()
    wanted = {
        "engine",
        "weights_bytes",
        "peak_bytes",
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
        "ttft_ms",
        "tpot_ms",
    }
    assert wanted <= row["cost"].keys()
