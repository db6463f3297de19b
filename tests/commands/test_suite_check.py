"""Every mistake in a suite, found without a model."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.cli import refused, run
from tests.helpers.suite import write_suite


def test_check_lists_all_that_is_wrong(tmp_path: Path) -> None:
    cases = [{"id": "a", "prompt": "p", "check": {"exakt": "x"}}]
    suite = write_suite(tmp_path, cases)
    (tmp_path / "text.jsonl").unlink()
    result = run("suite", "check", suite, "--json")
    assert result.exit_code == 2
    problems = json.loads(result.stdout)["problems"]
    assert len(problems) == 2
    assert "text.jsonl: no such file" in problems[0]
    assert "cases.jsonl:1: check.exakt: unknown key; did you mean exact?" in problems[1]
    gates = [{"metric": "no.such", "max": 1}, {"metric": "regression.passed"}]
    said = refused(2, "suite", "check", write_suite(tmp_path, cases, gates=gates))
    assert "gates.0: no such metric: no.such" in said and "gates.1: a gate needs min" in said


def test_check_knows_what_gates_ask_of_the_cases(tmp_path: Path) -> None:
    case = {"id": "a", "prompt": "p", "check": {"exact": "x"}, "tags": ["sums"]}
    gates = [{"metric": "regression.tags.facts.pass_rate", "min": 1}]
    result = run("suite", "check", write_suite(tmp_path, [case], gates=gates))
    assert result.exit_code == 2
    assert "gates.0: no case has the tag facts. The cases' tags are sums." in result.stdout


def test_check_finds_calibration_text_in_a_suite(tmp_path: Path) -> None:
    from quantkit.base import resources

    lines = (resources.calibration() / "general-v1.jsonl").read_text().splitlines()
    seen = json.loads(lines[0])["text"]
    case = {"id": "seen", "prompt": seen[:400], "check": {"contains": "x"}}
    suite = write_suite(tmp_path, [case])
    good = run("suite", "check", suite)
    assert good.exit_code == 0 and good.stdout.rstrip().endswith("suite.yaml: good")
    found = run("suite", "check", suite, "--recipe", "gptq-w4-g128", "--recipe", "rtn-w4-g128")
    assert found.exit_code == 2
    assert "gptq-w4-g128: 1 of the suite's 41 texts overlap with" in found.stdout
    assert "cases.jsonl: seen shares" in found.stdout
    assert "rtn-w4-g128: has no calibration text" in found.stdout
