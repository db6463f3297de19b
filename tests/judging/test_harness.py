"""lm-evaluation-harness on our loaded models: its own figures, paired sample by sample."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from quantkit.base import resources
from quantkit.base.errors import InputError
from quantkit.base.resources import demo_model
from quantkit.calibration.text import load_tokenizer
from quantkit.judging.harness import Harness, HarnessRun, pair_runs
from quantkit.recipes.suite import HarnessTasks
from tests.helpers.cli import run

TASKS = resources.suites() / "demo-tasks"
lm_eval = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("lm_eval") is None,
    reason="lm-eval isn't installed (pip install 'quantkit[harness]')",
)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def suite_of(place: Path, gates: list[dict[str, Any]], **harness: object) -> Path:
    held = [line for line in (resources.suites() / "demo-heldout.jsonl").open()][:30]
    (place / "text.jsonl").write_text("".join(held))
    content = {
        "schema": 1,
        "name": "harness",
        "version": "1.0.0",
        "likelihood": {"dataset": "text.jsonl", "sequence_length": 64},
        "harness": {"tasks": ["demo_claims", "demo_sums"], "include_path": str(TASKS), **harness},
        "gates": gates,
    }
    path = place / "suite.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two bits, judged by two tasks."""
    place = tmp_path_factory.mktemp("harness")
    bits = ("--set", "quantize.bits=2", "--set", "quantize.format=gptq")
    made = run("quantize", "rtn-w4-g128", "-m", "demo", "-o", place / "w2", *bits)
    assert made.exit_code == 0, made.output
    gates = [
        {"metric": "harness.demo_claims.acc", "min": 0.99},
        {"metric": "harness.demo_sums.broken", "min": 0},
        {"metric": "harness.demo_sums.difference", "min": -1, "max": 1, "confidence": 0.95},
    ]
    suite = suite_of(place, gates)
    result = run("eval", place / "w2", "--baseline", "demo", "--suite", suite, "--json")
    assert result.exit_code == 1, result.output
    return json.loads(result.stdout)


@lm_eval
@pytest.mark.slow
def test_figures_are_those_of_lm_evals_own_command_line(
    judged: dict[str, Any], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={demo_model()},dtype=float32"]
    command += ["--tasks", "demo_claims,demo_sums", "--include_path", str(TASKS)]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    # the tasks' data are named relative to their folder
    subprocess.run(command, cwd=TASKS, check=True, capture_output=True, env={**os.environ})
    (results,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(results.read_text())["results"]
    ours = {task["task"]: task for task in judged["baseline"]["quality"]["harness"]}
    assert ours["demo_claims"]["metrics"]["acc"] == theirs["demo_claims"]["acc,none"]
    assert ours["demo_sums"]["metrics"]["exact_match"] == theirs["demo_sums"]["exact_match,none"]
    assert 0.5 < ours["demo_claims"]["metrics"]["acc"] < 1  # figures that could differ
    for task, metric in (("demo_claims", "acc"), ("demo_sums", "exact_match")):
        (samples,) = (tmp_path / "out").rglob(f"samples_{task}_*.jsonl")
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        found = {line["doc_id"]: (line["doc_hash"], line[metric]) for line in lines}
        assert found == {s["doc_id"]: (s["doc_hash"], s["value"]) for s in ours[task]["samples"]}


@lm_eval
def test_samples_are_paired_and_gated(judged: dict[str, Any]) -> None:
    (row,) = judged["variants"]
    assert row["verdict"] == "FAIL"
    outcomes = {gate["metric"]: gate for gate in row["gates"]}
    for task in row["quality"]["harness"]:
        samples = task["samples"]
        assert len(samples) == {"demo_claims": 100, "demo_sums": 50}[task["task"]]
        worse = sum(s["value"] < s["baseline_value"] for s in samples)
        better = sum(s["value"] > s["baseline_value"] for s in samples)
        assert (task["broken"], task["fixed"]) == (worse, better)
        metric = {"demo_claims": "acc", "demo_sums": "exact_match"}[task["task"]]
        assert task["metrics"][metric] == pytest.approx(
            sum(s["value"] for s in samples) / len(samples)
        )
        change = task["metrics"][metric] - task["baseline_metrics"][metric]
        assert change == pytest.approx((better - worse) / len(samples))
    sums = next(t for t in row["quality"]["harness"] if t["task"] == "demo_sums")
    assert sums["broken"] > 0  # two bits can't add
    assert outcomes["harness.demo_sums.broken"]["value"] == sums["broken"]
    assert not outcomes["harness.demo_claims.acc"]["passed"]
    interval = outcomes["harness.demo_sums.difference"]["interval"]
    assert interval["low"] < sums["difference"] < interval["high"] and interval["samples"] == 50


@pytest.fixture
def own_tasks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Listing the thousands of tasks that lm-eval brings takes seconds."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))


@lm_eval
def test_groups_limits_and_examples(tmp_path: Path, own_tasks_only: None) -> None:
    from transformers import AutoModelForCausalLM

    place = shutil.copytree(TASKS, tmp_path / "tasks")
    (place / "all.yaml").write_text(
        "group: demo_all\ntask: [demo_facts, demo_claims]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    harness = Harness(HarnessTasks(("demo_all", "demo_sums"), 5, 2, place, True))
    harness.check_metrics(["harness.demo_all.acc", "harness.demo_facts.acc_norm", "top1_agreement"])
    model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32).eval()
    said: list[str] = []
    ran = harness.run(model, load_tokenizer(demo_model()), said.append)
    assert {name: len(samples) for name, samples in ran.samples.items()} == dict.fromkeys(
        ("demo_facts", "demo_claims", "demo_sums"), 5
    )
    mean = (ran.metrics["demo_facts"]["acc"] + ran.metrics["demo_claims"]["acc"]) / 2
    assert ran.metrics["demo_all"]["acc"] == pytest.approx(mean)
    prompt = ran.samples["demo_sums"][0]["arguments"][0][0]
    assert prompt.count("<|user|>\n<|user|>") in (1, 3)  # through the template, after examples
    assert "harness: 5 of 5 requests" in said
    assert pair_runs(ran, ran).metric("demo_all.acc") == pytest.approx(mean)
    assert pair_runs(ran, ran).metric("demo_all.broken") is None


@lm_eval
@pytest.mark.parametrize(
    ("gates", "harness", "message"),
    [
        (
            [{"metric": "harness.demo_sums.acc", "min": 1}],
            {},
            "the suite's tasks don't measure harness.demo_sums.acc",
        ),
        ([], {"tasks": ["demo_nothing"]}, "lm-eval knows no task demo_nothing"),
        ([], {"include_path": "nowhere"}, "there is no folder"),
    ],
)
def test_mistakes_are_found_before_work(
    tmp_path: Path,
    own_tasks_only: None,
    gates: list[dict[str, object]],
    harness: dict[str, Any],
    message: str,
) -> None:
    suite = suite_of(tmp_path, gates, **harness)
    result = run("eval", tmp_path, "--baseline", "demo", "--suite", suite)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())


def test_gates_on_tasks_need_tasks(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, [{"metric": "harness.demo_sums.acc", "min": 1}])
    content = yaml.safe_load(suite.read_text())
    del content["harness"]
    suite.write_text(yaml.safe_dump(content))
    result = run("suite", "check", suite)
    assert result.exit_code == 2 and "needs a harness section" in result.stderr


def test_code_in_tasks_must_be_allowed(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text("task: t\ndoc_to_text: !function utils.text\n")
    with pytest.raises(InputError) as caught:
        Harness(HarnessTasks(("t",), None, None, tmp_path, False))
    assert caught.value.fix is not None and "--allow-code" in caught.value.fix


def test_without_lm_eval_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    suite = suite_of(tmp_path, [])
    result = run("eval", tmp_path, "--baseline", "demo", "--suite", suite)
    assert result.exit_code == 3
    assert "pip install 'quantkit[harness]'" in " ".join(result.stderr.split())
    checked = run("suite", "check", suite)
    assert checked.exit_code == 0 and "not checked: the package lm-eval" in checked.stdout


def test_other_samples_are_not_compared() -> None:
    def ran(doc_hash: str) -> HarnessRun:
        sample = {"doc_id": 0, "doc_hash": doc_hash, "prompt_hash": "p", "filter": "none"}
        return HarnessRun(
            {"t": {"acc": 1.0}}, {"t": [{**sample, "acc": 1.0, "filtered_resps": []}]}, {}
        )

    assert pair_runs(ran("a"), ran("a")).metric("t.broken") == 0
    with pytest.raises(RuntimeError, match="isn't the same on both sides"):
        pair_runs(ran("a"), ran("b"))
