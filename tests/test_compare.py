"""Gates and verdicts, and the table that shows them."""

from __future__ import annotations

import json

import pytest

from quantkit.compare import _differences, decide
from quantkit.reports.cells import notes, table
from quantkit.reports.markdown import comparison_markdown
from quantkit.results import (
    CaseOutcome,
    Comparison,
    Cost,
    KlDivergence,
    Perplexity,
    Quality,
    RegressionResult,
    Variant,
    Verdict,
)
from quantkit.suite import Gate


def quality(kl: float = 0.01, broken: int = 0) -> Quality:
    cases = tuple(
        CaseOutcome(f"c{i}", i >= broken, True, i == 0, (), "no|w", "before") for i in range(4)
    )
    return Quality(
        Perplexity(10.0, 0.1, 1.01),
        KlDivergence(kl, kl * 0.9, kl * 1.1, kl * 5),
        0.97,
        RegressionResult(cases),
        "float32",
        8,
        256,
    )


def variant(**changes) -> Variant:
    fields = {
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
def test_gates(gate, verdict):
    decided = decide(variant(), [Gate(**gate)])
    assert decided.verdict == Verdict(verdict)
    assert decided.gates[0].passed == (verdict == "PASS")


def test_one_failed_gate_fails_all_of_it():
    gates = [Gate(metric="kl_divergence.mean", max=1), Gate(metric="regression.broken", max=0)]
    decided = decide(variant(quality=quality(broken=1)), gates)
    assert decided.verdict is Verdict.FAIL
    assert [gate.passed for gate in decided.gates] == [True, False]


def test_a_metric_that_was_not_measured_fails():
    quality_without = Quality(Perplexity(1, 0, 1), None, None, None, "float32", 1, 8)
    decided = decide(
        variant(quality=quality_without), [Gate(metric="regression.broken_critical", max=0)]
    )
    assert decided.verdict is Verdict.FAIL and decided.gates[0].value is None


def test_nothing_is_rounded_before_a_comparison():
    gates = [Gate(metric="kl_divergence.mean", max=0.02)]
    assert decide(variant(quality=quality(kl=0.02 + 1e-12)), gates).verdict is Verdict.FAIL


def comparison() -> Comparison:
    cost = Cost("transformers", "cpu", 2, 128, 32, 3, missing={"decode": "no such kernel"})
    row = decide(
        variant(quality=quality(broken=1), cost=cost), [Gate(metric="regression.broken", max=0)]
    )
    base = variant(name="BF16", recipe=None, method=None)
    return Comparison(
        "s 1.0.0", base, (), (row,), ("v: the weights only.",), "serve it", Verdict.FAIL
    )


def test_the_table_says_what_is_missing_broken_and_failed():
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
def test_what_differs_names_the_inputs_where_they_are_rounded(method, what):
    (said,) = _differences(variant(name="BF16"), [], [variant(method=method)])
    assert f"{what} only" in said


def test_markdown_is_a_well_formed_table():
    lines = comparison_markdown(comparison()).splitlines()
    table_lines = [line for line in lines if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in table_lines} == {4}
    assert any("no\\|w" in line for line in lines)


def test_json_has_the_documented_fields():
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
