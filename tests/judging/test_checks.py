"""Checks of answers: what passes, what fails and why, and checks that are malformed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from quantkit.judging.answers import Answer, check_answer, similarity
from quantkit.judging.checks import Check, Choice
from quantkit.judging.schemas import compile_path

PERSON = {
    "type": "object",
    "required": ["name", "age"],
    "properties": {"name": {"type": "string"}, "age": {"$ref": "#/$defs/age"}},
    "$defs": {"age": {"type": "integer", "minimum": 0}},
}
ADA = '{"name": "Ada", "age": 36, "likes": ["tea", "sums"]}'


def why(check: dict[str, Any], text: str, *, baseline: str = "", tokens: int = 0) -> list[str]:
    found = check_answer(Check(**check), Answer(text, tokens), Answer(baseline), {})
    return [reason for reason in found.values() if reason is not None]


@pytest.mark.parametrize(
    ("check", "good", "bad", "reason"),
    [
        ({"exact": "red"}, " red\n", "Red", "is not 'red'"),
        ({"contains": "red"}, "it is red.", "it is blue.", "lacks 'red'"),
        ({"regex": r"^\d{3}$"}, "123", "1234", "no match"),
        ({"number": 12}, "3 and then 12", "12 and then 3", "last number is 3, not 12"),
        ({"number": 0.5, "tolerance": 0.01}, "about 0.505", "about 0.52", "last number is 0.52"),
        ({"number": -1234}, "that is -1,234.", "that is 1,234.", "not -1234"),
        ({"number": 4}, "4", "none", "holds no number"),
        ({"number": 3}, "5-3", "5 -3", "last number is -3"),
        ({"json_schema": PERSON}, ADA, '{"name": "Ada"}', "'age' is a required property"),
        ({"json_schema": PERSON}, f"```json\n{ADA}\n```", "Ada, 36", "isn't JSON"),
        ({"json_schema": PERSON}, ADA, ADA.replace("36", "-1"), "$.age: -1 is less than"),
        ({"json_path": {"$.name": "Ada"}}, ADA, '{"name": "Bob"}', "$.name is '\"Bob\"'"),
        ({"json_path": {"$.likes[*]": ["tea", "sums"]}}, ADA, '{"likes": ["tea"]}', "$.likes[*]"),
        ({"json_path": {"$.age": 36}}, ADA, "{}", "$.age isn't there"),
        ({"json_path": {"$.ok": True}}, '{"ok": true}', '{"ok": 1}', "$.ok is '1', not 'true'"),
        ({"similarity": {"to": "a b c d", "min": 0.75}}, "a b c", "a b x y", "similarity is 0.5"),
        ({"refuses": True}, "I'm sorry, but I can’t help with that.", "Sure.", "doesn't refuse"),
        ({"refuses": ["nope"]}, "Nope!", "I can't.", "doesn't refuse"),
        (
            {"does_not_refuse": True},
            "Sorry to hear it. Try tea.",
            "I am unable to.",
            "refuse",
        ),
        ({"contains": "a", "regex": "b"}, "ab", "a", "no match of b"),
    ],
)
def test_checks(check: dict[str, Any], good: str, bad: str, reason: str) -> None:
    assert why(check, good) == []
    (said,) = why(check, bad)
    assert reason in said


def test_likeness_is_to_the_baseline_unless_an_answer_is_recorded() -> None:
    assert why({"similarity": 0.8}, "one two three", baseline="one  two three\n") == []
    assert why({"similarity": 0.8}, "one two", baseline="three four") == [
        "similarity is 0.000, at least 0.8 is wanted"
    ]
    assert similarity("the cat sat", "the cat sat") == 1
    assert similarity("a b c d", "a b") == pytest.approx(2 * 2 / 6)
    assert similarity("", "") == 1


def test_answers_may_not_be_too_long() -> None:
    assert why({"max_tokens": 3}, "a b c", tokens=3) == []
    assert why({"max_tokens": 3}, "a b c d", tokens=4) == ["is longer than 3 tokens"]


def test_a_choice_is_the_likeliest_option() -> None:
    choice = Check(choice=Choice(options=["yes", "surely"], expected="yes"))
    assert choice.choice is not None and choice.choice.best([-1.0, -1.5]) == "yes"
    by_length = Check(choice=Choice(options=["yes", "surely"], expected="yes", per_character=True))
    assert by_length.choice is not None and by_length.choice.best([-1.0, -1.5]) == "surely"
    wrong = check_answer(choice, Answer("surely", scores=(-2.0, -1.0)), Answer(""), {})
    assert wrong == {"choice": "'surely' (-1.00) is likelier than 'yes' (-2.00)"}


@pytest.mark.parametrize(
    ("check", "message"),
    [
        ({}, "needs one of exact, contains"),
        ({"tolerance": 1}, "needs one of"),
        ({"exact": "x", "tolerance": 1.0}, "tolerance needs number"),
        ({"regex": "("}, "doesn't compile"),
        ({"json_schema": {"type": "objekt"}}, "isn't a JSON Schema"),
        ({"json_schema": {"$ref": "https://example.com/person.json"}}, "doesn't hold $ref"),
        ({"json_schema": {"$ref": "#/$defs/nobody"}}, "doesn't hold $ref"),
        ({"json_schema": 3}, "must be a JSON Schema, or the path of one"),
        ({"json_path": {"$.a[": 1}}, "doesn't compile"),
        ({"json_path": {"name": 1}}, "doesn't begin with $"),
        ({"choice": {"options": ["a", "b"], "expected": "c"}}, "is none of the options"),
        ({"choice": {"options": ["a", "a"], "expected": "a"}}, "options must differ"),
        ({"similarity": 1.5}, "less than or equal to 1"),
        ({"refuses": False}, "must be true, or a list of phrases"),
        ({"python": "no function"}, "match pattern"),
    ],
)
def test_malformed_checks_are_refused(check: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Check(**check)
    assert message in str(caught.value)


def test_a_function_says_whether_and_why(tmp_path: Path) -> None:
    (tmp_path / "own_checks.py").write_text(
        "def short(answer, case):\n"
        "    return len(answer) <= case['limit'], f'{len(answer)} characters'\n"
        "def crash(answer, case):\n"
        "    return answer[10]\n"
    )
    check = Check(python="own_checks:short").resolve(tmp_path)
    told = {"limit": 3}
    assert check_answer(check, Answer("abc"), Answer(""), told) == {"python": None}
    assert check_answer(check, Answer("abcd"), Answer(""), told) == {"python": "4 characters"}
    crash = Check(python="own_checks:crash").resolve(tmp_path)
    (reason,) = check_answer(crash, Answer("abc"), Answer(""), told).values()
    assert reason == "own_checks:crash raised IndexError: string index out of range"
    for name in ("own_checks:nothing", "no_such_module:f"):
        with pytest.raises(ValueError, match="can't be imported"):
            Check(python=name).resolve(tmp_path)


def test_a_schema_may_be_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "person.json").write_text(json.dumps(PERSON))
    check = Check(json_schema="person.json").resolve(tmp_path)
    assert check_answer(check, Answer(ADA), Answer(""), {}) == {"json_schema": None}
    with pytest.raises(ValueError, match="can't be read"):
        Check(json_schema="nowhere.json").resolve(tmp_path)


def test_paths_are_those_of_rfc_9535() -> None:
    value = {"a": [{"b": 1}, {"b": 2}], "é": 3}
    assert compile_path("$.a[?@.b > 1].b").findall(value) == [2]
    assert compile_path("$['é']").singular_query() and compile_path("$.a[-1].b").findall(value) == [
        2
    ]
