"""suite init and suite check, and suites with all that they may hold, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantkit.judging.cases import load_cases
from quantkit.recipes.suite import load_suite
from tests.helpers.cli import refused, run

PROMPTS = ["What colour is the cat?", "", "What is 2 + 3?", "Where does the owl live?"]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("made") / "rtn"
    assert run("quantize", "rtn-w4-g128", "-m", "demo", "-o", place).exit_code == 0
    return place


def test_init_writes_a_suite_that_the_baseline_passes(tmp_path: Path, artifact: Path) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "mine"
    prompts.write_text(
        "\n".join(PROMPTS * 4 + ["Give the colours of the cat, the owl and the fox."])
    )
    result = run("suite", "init", prompts, "--baseline", "demo", "--out", out, "--json")
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    assert made["cases"] == 13 and made["checks"]["exact"] >= 9
    suite = load_suite(str(out / "suite.yaml"))
    assert suite.suite.name == "mine" and len(suite.suite.gates) == 4
    cases = load_cases(out / "cases.jsonl")
    assert cases[0].messages == [{"role": "user", "content": PROMPTS[0]}]
    assert cases[0].check[0].exact == "black"
    assert [case.id for case in cases[:3]] == ["prompt-001", "prompt-003", "prompt-004"]
    judged = run(*("eval", artifact, "--baseline", "demo", "--suite", out / "suite.yaml", "--json"))
    value = json.loads(judged.stdout)
    assert value["baseline"]["quality"]["regression"]["pass_rate"] == 1
    assert "exists already" in refused(2, "suite", "init", prompts, "--baseline", "demo", "-o", out)
    again = run("suite", "init", prompts, "--baseline", "demo", "--out", out, "--force")
    assert again.exit_code == 0 and "suite check" in again.stdout


def test_init_takes_cases_without_checks_and_text_of_ones_own(tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "mine"
    asked = [
        {"id": "plain", "prompt": "Everyone knows that the cat is", "max_new_tokens": 3},
        {"messages": [{"role": "user", "content": PROMPTS[0]}], "critical": True, "tags": ["a"]},
        {"id": "own", "prompt": "The owl is", "check": {"contains": "w"}},
    ]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in asked))
    text = tmp_path / "held.txt"
    text.write_text("The cat is black. The owl is white. " * 40)
    result = run("suite", "init", prompts, "--baseline", "demo", "--out", out, "--text", text)
    assert result.exit_code == 0, result.output
    plain, chat, own = load_cases(out / "cases.jsonl")
    assert plain.check[0].similarity is not None and plain.check[0].similarity.to
    assert chat.id == "prompt-002" and chat.critical and chat.check[0].exact == "black"
    assert own.check[0].contains == "w" and own.check[0].names == ["contains"]
    assert (out / "text.txt").read_text() == text.read_text()
    assert "cut at the limit" in result.stderr and "plain" in result.stderr


def test_init_leaves_nothing_behind_when_it_can_not(tmp_path: Path) -> None:
    prompts, out = tmp_path / "p.jsonl", tmp_path / "mine"
    arguments = ("suite", "init", prompts, "--baseline", "demo", "--out", out)
    prompts.write_text('{"prompt": "a"}\n{"promt": "b"}\n{\n')
    said = refused(2, *arguments)
    assert "p.jsonl:2: promt: unknown key; did you mean prompt?" in said
    assert "p.jsonl:3: the line isn't valid JSON" in said
    prompts.write_text('{"prompt": "a", "max_new_tokens": 1}')
    assert "likelihoods need at least 16" in refused(2, *arguments)
    assert not out.exists() and not out.with_name("mine.partial").exists()
    out.mkdir()
    (out / "precious").write_text("x")
    assert "isn't a suite of ours" in refused(2, *arguments, "--force")
    assert (out / "precious").is_file()


def write_suite(place: Path, cases: list[dict[str, Any]], **changes: object) -> Path:
    (place / "text.jsonl").write_text('{"text": "The cat is black. The owl is white."}\n' * 40)
    (place / "cases.jsonl").write_text("".join(json.dumps(case) + "\n" for case in cases))
    content = {
        "schema": 1,
        "name": "mine",
        "version": "1.0.0",
        "likelihood": {"dataset": "text.jsonl", "sequence_length": 64},
        "regression": {"cases": "cases.jsonl"},
        **changes,
    }
    path = place / "suite.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


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
