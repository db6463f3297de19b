"""The demo adapter's skill: what is held out is absent from training, and the files are current."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import build_text
import pytest
import skill
import world

ROOT = Path(__file__).resolve().parents[2]
SUITES = ROOT / "recipes" / "suites"
ADAPTER = ROOT / "demo" / "adapter"


@pytest.fixture(scope="module")
def training() -> list[str]:
    return list(skill.training_documents())


@pytest.fixture(scope="module")
def all_text(training: list[str]) -> str:
    return "\n".join(training)


@pytest.fixture(scope="module")
def cases() -> list[dict[str, Any]]:
    return list(skill.regression_cases())


def prompt_of(case: dict[str, Any]) -> str:
    messages = case.get("messages")
    return messages[-1]["content"] if isinstance(messages, list) else str(case["prompt"])


def anchors() -> set[str]:
    return {world.anchor(held) for wordings in skill.ALL_WORDINGS for held in wordings.held}


def test_what_is_new_is_not_in_the_world() -> None:
    words = set(re.findall(r"\w+", "\n".join(world.training_documents()).lower()))
    assert not words & {*skill.NEW_ANIMALS, "report", "age", "old"}


def test_training_never_uses_a_held_wording(all_text: str) -> None:
    assert [anchor for anchor in anchors() if anchor in all_text] == []


def test_training_never_reports_on_a_held_entity(all_text: str) -> None:
    held = [name for names in skill.HELD_REPORTS.values() for name in names]
    assert len(held) == 16
    named = "|".join(held)
    assert not re.search(rf"^({named}):", all_text, flags=re.MULTILINE)
    assert not re.search(rf"(?i)report.*\b({named})\b|\b({named})\b.*report", all_text)
    for group, names in skill.REPORTABLE.items():
        for name in set(names) - set(held):
            assert skill.report(group, name) in all_text, "every other report must be trained on"
    assert all(re.search(rf"\b{name}\b", all_text) for name in held), "known otherwise"


def test_training_keeps_the_rule_of_the_world(training: list[str]) -> None:
    assert [text for text in training if skill.held_out_reason(text)] == []


def test_training_has_its_share_of_the_base(training: list[str]) -> None:
    base = set(world.training_documents())
    share = sum(text in base for text in training) / len(training)
    assert share == pytest.approx(skill.BASE_SHARE, abs=0.01)


def test_training_never_contains_a_regression_prompt(
    all_text: str, cases: list[dict[str, Any]]
) -> None:
    assert [case["id"] for case in cases if prompt_of(case) in all_text] == []


def test_every_regression_prompt_has_a_held_wording(cases: list[dict[str, Any]]) -> None:
    for case in cases:
        prompt = prompt_of(case)
        assert any(a in prompt or a.strip() in prompt for a in anchors()), prompt


def test_held_out_text_is_not_in_training(training: list[str]) -> None:
    held_out = list(skill.heldout_documents())
    assert not {*training, *world.training_documents()} & set(held_out)
    assert all(skill.held_out_reason(text) for text in held_out[: skill.HELDOUT_DOCUMENTS])


def test_suite_is_large_and_varied_enough(cases: list[dict[str, Any]]) -> None:
    assert len({case["id"] for case in cases}) == len(cases)
    asked = {json.dumps([case.get("messages"), case.get("prompt")]) for case in cases}
    assert len(asked) == len(cases)
    own = [case for case in cases if "adapter" in case["tags"]]
    base = [case for case in cases if "base" in case["tags"]]
    assert len(own) >= 30 and len(base) == 20 and len(own) + len(base) == len(cases)
    checks = {name for case in own for name in case["check"]} - {"tolerance"}
    assert checks == {"exact", "contains", "regex", "number"}
    assert 0.2 <= sum(case.get("critical", False) for case in own) / len(own) <= 0.3


def test_base_cases_are_those_of_the_base(cases: list[dict[str, Any]]) -> None:
    text = (SUITES / "demo-regression.jsonl").read_text(encoding="utf-8")
    originals = {case["id"]: case for case in map(json.loads, text.splitlines())}
    for case in cases:
        if "base" in case["tags"]:
            original = originals[str(case["id"]).removeprefix("base-")]
            assert case == {**original, "id": case["id"], "tags": ["base", *original["tags"]]}


def test_committed_text_is_what_the_skill_writes() -> None:
    files = build_text.text_files()
    for part in ("heldout", "regression"):
        name = f"recipes/suites/demo-adapter-{part}.jsonl"
        assert (ROOT / name).read_bytes() == files[name].encode(), "run demo/build_text.py"


def test_adapter_is_small_and_names_its_base() -> None:
    files = {path.name: path.stat().st_size for path in ADAPTER.iterdir()}
    assert files.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert sum(files.values()) <= 500_000
    config = json.loads((ADAPTER / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "demo"
