"""A suite made of the baseline's own answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from quantkit.base.resources import demo_model
from quantkit.judging.cases import load_cases
from quantkit.recipes.suite import load_suite
from tests.helpers.cli import refused, run
from tests.helpers.tiny import build

PROMPTS = ["What colour is the cat?", "", "What is 2 + 3?", "Where does the owl live?"]


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


def test_init_asks_what_records_of_text_ask(tmp_path: Path) -> None:
    prompts, out = tmp_path / "chats.json", tmp_path / "mine"
    turns = [{"from": "human", "value": PROMPTS[2]}] * 2
    asked = [
        {"instruction": PROMPTS[0], "input": "", "output": "green"},
        {"id": 7, "conversations": [*turns, {"from": "gpt", "value": "6"}]},
        {"prompt": "The owl is", "completion": " white"},
        {"text": " "},
        PROMPTS[3],
    ]
    prompts.write_text(json.dumps(asked), encoding="utf-8-sig")
    result = run(*("suite", "init", prompts, "--baseline", "demo", "--out", out))
    assert result.exit_code == 0, result.output
    assert "prompts: chats.json: a JSON array, 4 prompts; 1 blank one dropped" in result.stderr
    user = [[{"role": "user", "content": PROMPTS[i]}] for i in (0, 2, 3)]
    assert [(c.id, c.messages, c.prompt) for c in load_cases(out / "cases.jsonl")] == [
        ("prompt-001", user[0], None),
        ("prompt-002", user[1] * 2, None),
        ("prompt-003", None, "The owl is"),
        ("prompt-005", user[2], None),
    ]


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


@pytest.mark.parametrize(
    ("kind", "changes", "problems"),
    [
        ("opt", {}, ["64 tokens after a prompt of", ":2: the prompt has"]),
        ("gptj", {"rotary_dim": 8}, ["64 tokens after a prompt of", ":2: the prompt has"]),
        ("llama", {}, [":2: the prompt has"]),
        ("llama", {"vocab_size": 300}, [":1 holds the token 'Ġ", "only 300 rows"]),
    ],
)
def test_init_asks_no_model_what_it_has_no_room_or_ids_for(
    tmp_path: Path, kind: str, changes: dict[str, object], problems: list[str]
) -> None:
    model, prompts = tmp_path / "model", tmp_path / "prompts.txt"
    build(kind, model, dtype=torch.float32, **{"vocab_size": 1024, **changes})
    for file in demo_model().glob("tokenizer*"):
        shutil.copy(file, model)
    prompts.write_text("The owl is white.\n" + "The owl is white. " * 20)
    said = refused(2, "suite", "init", prompts, "--baseline", model, "-o", tmp_path / "out")
    assert all(problem in said for problem in problems) and str(prompts) in said
    assert not (tmp_path / "out").exists()
