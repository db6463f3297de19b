"""Regression cases: checks, what moved, and errors with their line."""

from __future__ import annotations

import json

import pytest

from quantkit.errors import InputError
from quantkit.quality.regression import Case, Check, judge, load_cases


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        ({"exact": "red"}, " red\n", "Red"),
        ({"contains": "red"}, "it is red.", "it is blue."),
        ({"regex": r"^\d{3}$"}, "123", "1234"),
        ({"number": 12}, "3 and then 12", "12 and then 3"),
        ({"number": 0.5, "tolerance": 0.01}, "about 0.505", "about 0.52"),
        ({"number": -1234}, "that is -1,234.", "that is 1,234."),
        ({"number": 4}, "4", "none"),
        ({"number": 3}, "5-3", "5 -3"),
        ({"contains": "a", "regex": "b"}, "ab", "a"),
    ],
)
def test_checks(check, good, bad):
    assert Check(**check).holds(good)
    assert not Check(**check).holds(bad)


def test_what_moved_is_counted():
    cases = [Case(id=str(i), prompt="p", check={"exact": "yes"}, critical=i == 0) for i in range(4)]
    result = judge(cases, ["no", "no", "yes", "yes"], ["yes", "yes", "yes", "no"])
    assert (result.passed, result.total, result.pass_rate) == (2, 4, 0.5)
    assert (result.broken, result.broken_critical, result.fixed) == (2, 1, 1)


GOOD = {"id": "a", "prompt": "p", "check": {"exact": "x"}}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "isn't valid JSON"),
        (json.dumps({**GOOD, "id": "first"}), "used twice"),
        (json.dumps({**GOOD, "check": {}}), "needs exact, contains, regex or number"),
        (json.dumps({**GOOD, "check": {"exakt": "x"}}), "check.exakt: Extra inputs"),
        (json.dumps({**GOOD, "check": {"regex": "("}}), "doesn't compile"),
        (json.dumps({**GOOD, "messages": []}), "needs prompt or messages"),
        (json.dumps({"id": "a", "check": {"exact": "x"}}), "needs prompt or messages"),
        (json.dumps({**GOOD, "max_new_tokens": 0}), "max_new_tokens"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "cases.jsonl"
    path.write_text(json.dumps({**GOOD, "id": "first"}) + "\n\n" + line + "\n")
    with pytest.raises(InputError) as caught:
        load_cases(path)
    assert str(caught.value).startswith(f"{path}:3: ") and message in str(caught.value)


def test_no_cases_is_an_error(tmp_path):
    path = tmp_path / "cases.jsonl"
    path.write_text("\n")
    with pytest.raises(InputError, match="holds no cases"):
        load_cases(path)
    with pytest.raises(InputError, match="can't be read"):
        load_cases(tmp_path / "nowhere.jsonl")
