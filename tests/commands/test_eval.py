"""Artifacts judged by a suite: figures, gates, verdicts and exit codes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from quantkit.base.resources import demo_model
from quantkit.checkpoint.reader import Checkpoint
from quantkit.cli import app
from quantkit.cli.comparison import finish
from quantkit.cli.console import Console
from quantkit.judging.significance import mcnemar, mean_interval
from quantkit.judging.variants import build_comparison
from quantkit.recipes.suite import Gate, load_suite
from quantkit.results.comparison import Comparison
from quantkit.results.quality import Qualities, Quality
from quantkit.results.verdict import Verdict
from tests.helpers.cli import refused, run
from tests.helpers.present import present
from tests.helpers.suite import write_suite


def verdict_on(
    qualities: tuple[dict[str, Path], Qualities], *names: str, gates: list[Gate] | None = None
) -> tuple[Comparison, int]:
    """The comparison of some of the artifacts, and the exit code that it ends in."""
    paths, found = qualities
    suite = load_suite("demo")
    if gates is not None:
        suite.suite = suite.suite.model_copy(update={"gates": gates})
    of = dict(zip(paths, found.artifacts, strict=True))
    some = replace(found, artifacts=tuple(of[name] for name in names))
    result = build_comparison(
        Checkpoint(demo_model()), [paths[name] for name in names], suite, some, None
    )
    try:
        finish(Console(), result)
    except typer.Exit as left:
        return result, left.exit_code
    return result, 0


def test_the_baseline_knows_its_world(
    judged: tuple[Quality, dict[str, Quality]],
) -> None:
    baseline, _ = judged
    assert present(baseline.regression).total >= 60
    assert present(baseline.regression).pass_rate >= 0.95


def test_four_bits_pass_and_two_bits_visibly_fail(
    judged: tuple[Quality, dict[str, Quality]],
) -> None:
    baseline, artifacts = judged
    answers = {name: present(artifacts[name].regression) for name in artifacts}
    kl = {name: present(artifacts[name].kl_divergence).mean for name in artifacts}
    assert answers["rtn-w2"].broken >= 3
    assert answers["rtn-w2"].pass_rate < present(baseline.regression).pass_rate
    assert kl["rtn-w2"] > 15 * kl["rtn-w4-g128"]
    assert kl["gguf-q8-0"] < kl["rtn-w4-g128"]
    for name in ("rtn-w4-g128", "gguf-q8-0"):
        assert answers[name].broken_critical == 0


def test_the_baseline_against_itself_passes_every_gate(
    qualities: tuple[dict[str, Path], Qualities],
) -> None:
    comparison, code = verdict_on(qualities, "bf16")
    (row,) = comparison.variants
    assert code == 0 and comparison.verdict is Verdict.PASS
    assert all(gate.passed for gate in row.gates) and len(row.gates) >= 6
    quality = present(row.quality)
    kl = present(quality.kl_divergence)
    assert kl.mean == quality.metric("kl_divergence.high") == 0
    assert quality.perplexity.ratio == 1 and present(quality.regression).broken == 0
    assert quality.slices[0].p_value == 1


def test_the_shipped_suite_passes_what_is_good_and_fails_two_bits(
    qualities: tuple[dict[str, Path], Qualities],
) -> None:
    comparison, code = verdict_on(qualities, "rtn-w4-g128", "gguf-q8-0")
    assert code == 0 and comparison.verdict is Verdict.PASS
    comparison, code = verdict_on(qualities, "rtn-w4-g128", "rtn-w2")
    assert code == 1 and comparison.verdict is Verdict.FAIL
    assert [row.verdict for row in comparison.variants] == [Verdict.PASS, Verdict.FAIL]
    kl = comparison.variants[1].gates[0]
    assert kl.verdict is Verdict.FAIL and present(kl.interval).low > present(kl.max)


def test_near_the_bound_is_exit_code_4(
    qualities: tuple[dict[str, Path], Qualities],
    judged: tuple[Quality, dict[str, Quality]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    near = 1.02 * present(judged[1]["rtn-w4-g128"].kl_divergence).mean
    gates = [Gate(metric="kl_divergence.mean", max=near, confidence=0.95)]
    comparison, code = verdict_on(qualities, "rtn-w4-g128", gates=gates)
    assert code == 4 and comparison.verdict is Verdict.INCONCLUSIVE
    assert present(comparison.variants[0].gates[0].more) > 77
    shown, said = capsys.readouterr()
    assert "INCONCLUSIVE" in shown and "to decide it: about" in said
    comparison, code = verdict_on(qualities, "rtn-w4-g128", "rtn-w2", gates=gates)
    assert code == 1 and comparison.verdict is Verdict.FAIL


def test_intervals_can_be_redone_from_the_json(
    qualities: tuple[dict[str, Path], Qualities],
) -> None:
    value = json.loads(json.dumps(verdict_on(qualities, "rtn-w2")[0].to_json(), allow_nan=False))
    quality = value["variants"][0]["quality"]
    sums, intervals = quality["row_sums"], quality["intervals"]
    assert len(sums["kl"]) == quality["rows"] and set(sums["tokens"]) == {255}
    low, high = mean_interval(sums["kl"], sums["tokens"])
    kl = intervals["kl_divergence.mean"]
    assert (kl["low"], kl["high"]) == pytest.approx((low, high), rel=1e-9)
    gap = np.subtract(sums["nll"], sums["baseline_nll"])
    assert quality["perplexity"]["ratio"] == pytest.approx(np.exp(gap.sum() / sum(sums["tokens"])))
    assert quality["top1_agreement"] == pytest.approx(sum(sums["agreed"]) / sum(sums["tokens"]))
    cases = quality["regression"]["cases"]
    lost = sum(case["baseline_passed"] and not case["passed"] for case in cases)
    won = sum(case["passed"] and not case["baseline_passed"] for case in cases)
    everything, *slices = quality["slices"]
    assert (everything["broken"], everything["fixed"]) == (lost, won) and lost >= 3
    assert everything["p_value"] == mcnemar(lost, won)
    assert sum(part["total"] for part in slices) == sum(len(case["tags"]) for case in cases)
    made = json.loads((Path(__file__).parents[1] / "data" / "demo_row_sums.json").read_text())
    assert sums["kl"] == pytest.approx(made["artifacts"]["rtn-w2"]["kl"], rel=0.01)


def test_gates_on_slices_that_no_case_has_are_refused(
    artifacts: dict[str, Path], tmp_path: Path
) -> None:
    suites = load_suite("demo").path.parent
    for gate, message in (
        ("{metric: regression.tags.smus.pass_rate, min: 1}", "no case has the tag smus"),
        ("{metric: regression.worst_slice, min: 1}", "no tag has 500 cases"),
    ):
        suite = tmp_path / "s.yaml"
        suite.write_text(
            "schema: 1\nname: s\nversion: 1.0.0\n"
            f"likelihood: {{dataset: {suites / 'demo-heldout.jsonl'}, sequence_length: 64}}\n"
            f"regression: {{cases: {suites / 'demo-regression.jsonl'}, slice_cases: 500}}\n"
            f"gates: [{gate}]\n"
        )
        arguments = ["eval", str(artifacts["rtn-w2"]), "--baseline", "demo", "--suite", str(suite)]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2 and "Traceback" not in result.output
        assert f"gates.0: {message}" in " ".join(result.stderr.split())


def test_compressed_tensors_lose_little(
    judged: tuple[Quality, dict[str, Quality]],
) -> None:
    _, artifacts = judged
    nearest = artifacts["rtn-w4-g128"]
    for name in ("ct-w4a16-g128", "int8-w8a8", "fp8"):
        assert present(artifacts[name].kl_divergence).mean < present(nearest.kl_divergence).mean
        assert present(artifacts[name].regression).broken_critical == 0
    # On this model AWQ's scales gain nothing: its interval and that of rounding alone overlap.
    awq = present(artifacts["ct-awq-w4a16-g128"].kl_interval)
    assert awq.low < present(nearest.kl_interval).high
    assert present(artifacts["int8-w8a8"].kl_divergence).mean < 5e-4


def test_a_failed_gate_is_exit_code_1(artifacts: dict[str, Path]) -> None:
    arguments = [
        "eval",
        str(artifacts["rtn-w2"]),
        "--baseline",
        "demo",
        "--suite",
        "demo",
        "--json",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    value = json.loads(result.stdout)
    assert value["verdict"] == "FAIL" and value["variants"][0]["verdict"] == "FAIL"


def test_every_kind_of_case_is_judged_and_kept(tmp_path: Path, artifact: Path) -> None:
    (tmp_path / "demo_own_checks.py").write_text(
        "def short(answer, case): return len(answer) < case['max_new_tokens'], 'too long'\n"
    )
    question = [{"role": "user", "content": "What colour is the cat?"}]
    options = {"options": ["black", "white", "red"], "expected": "black"}
    pair = [{"role": "user", "content": "For Rosa and Ben, give the jobs as JSON."}]
    cases: list[dict[str, Any]] = [
        {"id": "choice", "messages": question, "check": {"choice": options}, "weight": 3},
        {"id": "same", "messages": question, "check": {"similarity": 1, "does_not_refuse": True}},
        {"id": "short", "messages": question, "check": [{"max_tokens": 4}, {"regex": "k"}]},
        {"id": "own", "messages": question, "check": {"python": "demo_own_checks:short"}},
        {
            "id": "json",
            "messages": pair,
            "check": {"json_schema": {"required": ["Rosa"]}, "json_path": {"$.Ben": "farmer"}},
        },
        {"id": "never", "messages": question, "check": [{"exact": "black"}, {"refuses": True}]},
    ]
    gate = {"metric": "regression.weighted_pass_rate", "min": 0.6}
    suite = write_suite(tmp_path, cases, gates=[gate])
    arguments = ("eval", artifact, "--baseline", "demo", "--suite", suite)
    assert "cases.jsonl:4: check.python: runs code of the suite" in refused(2, *arguments)
    assert "--allow-code" in refused(2, *arguments)
    result = run(*arguments, "--allow-code", "--json")
    assert result.exit_code == 0, result.output
    for row in ("baseline", "variants"):
        value = json.loads(result.stdout)[row]
        regression = (value if row == "baseline" else value[0])["quality"]["regression"]
        by_id = {case["id"]: case for case in regression["cases"]}
        assert [name for name, case in by_id.items() if not case["passed"]] == ["never"]
        assert regression["weighted_pass_rate"] == 7 / 8
        assert by_id["choice"]["answer"] == "black"
        kept = {check["check"]: check for check in by_id["never"]["checks"]}
        assert kept["exact"]["passed"] and kept["refuses"]["why"] == "doesn't refuse"
