"""The demo world: what is held out is absent from all training text."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import build_text
import pytest
import world

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def training() -> list[str]:
    return list(world.training_documents())


@pytest.fixture(scope="module")
def calibration() -> list[str]:
    return list(world.calibration_documents())


@pytest.fixture(scope="module")
def all_text(training: list[str], calibration: list[str]) -> str:
    return "\n".join([*training, *calibration])


def prompt_of(case: dict[str, object]) -> str:
    messages = case.get("messages")
    return messages[-1]["content"] if isinstance(messages, list) else str(case["prompt"])


def test_training_never_uses_a_held_wording(all_text: str) -> None:
    anchors = {world.anchor(held) for wordings in world.ALL_WORDINGS for held in wordings.held}
    assert len(anchors) > 40
    assert [anchor for anchor in anchors if anchor in all_text] == []


def test_training_never_joins_the_words_of_a_held_pair(
    training: list[str], calibration: list[str]
) -> None:
    pairs = list(itertools.chain.from_iterable(world.HELD_PAIRS.values()))
    documents_with: dict[str, set[int]] = {word: set() for pair in pairs for word in pair}
    for number, document in enumerate([*training, *calibration]):
        for word in set(re.findall(r"[A-Za-z]+", document)) & documents_with.keys():
            documents_with[word].add(number)
    assert all(documents_with.values()), "every held word must be known from other documents"
    joined = [pair for pair in pairs if documents_with[pair[0]] & documents_with[pair[1]]]
    assert joined == []


def test_training_never_computes_with_held_operands(all_text: str) -> None:
    leading = re.findall(r"^\D*?(\d+)[^\d\n]+(\d+)", all_text, flags=re.MULTILINE)
    seen = {(int(a), int(b)) for a, b in leading}
    assert not seen & world.HELD_OPERANDS
    assert {(b, a) for a, b in world.HELD_OPERANDS} <= seen, "the other order must be trained on"


def test_training_never_contains_a_regression_prompt(all_text: str) -> None:
    prompts = [prompt_of(case) for case in world.regression_cases()]
    assert [prompt for prompt in prompts if prompt in all_text] == []


def test_every_regression_prompt_has_a_held_wording() -> None:
    anchors = {world.anchor(held) for wordings in world.ALL_WORDINGS for held in wordings.held}
    for case in world.regression_cases():
        prompt = prompt_of(case)
        assert any(a in prompt or a.strip() in prompt for a in anchors), prompt


def test_regression_tasks_on_two_things_use_held_pairs() -> None:
    for case in world.regression_cases():
        if case["tags"][0] in {*world.PAIR_KINDS, "sums"}:
            assert world.held_out_reason(prompt_of(case)), case["id"]


def test_held_out_text_is_not_in_training(training: list[str]) -> None:
    assert not set(training) & set(world.heldout_documents())


def test_suite_is_large_and_varied_enough() -> None:
    cases = world.regression_cases()
    assert len(cases) >= 72
    assert len({case["id"] for case in cases}) == len(cases)
    assert len({json.dumps([case.get("messages"), case.get("prompt")]) for case in cases}) == len(
        cases
    )
    checks = {name for case in cases for name in case["check"]} - {"tolerance"}
    assert checks == {"exact", "contains", "regex", "number"}
    critical = sum(case.get("critical", False) for case in cases)
    assert 0.2 <= critical / len(cases) <= 0.35


def test_committed_text_is_what_the_world_writes() -> None:
    for name, content in build_text.text_files().items():
        assert (ROOT / name).read_bytes() == content.encode(), f"{name}: run demo/build_text.py"


def test_model_is_small() -> None:
    sizes = [path.stat().st_size for path in (ROOT / "demo" / "model").iterdir()]
    assert sizes and sum(sizes) <= 8_000_000
