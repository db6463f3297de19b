"""Regression cases: what a model is asked, and every mistake in a file with its line."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from quantkit.base.errors import InputError
from quantkit.base.resources import demo_model
from quantkit.calibration.text import load_tokenizer
from quantkit.judging.answers import Answer
from quantkit.judging.cases import Case, case_inputs, check_prompts, encode_prompt, load_cases
from quantkit.judging.checks import Check
from quantkit.judging.regression import judge_answers
from quantkit.model.limits import Limits


def test_messages_go_through_the_template_with_system_prompt_and_tools() -> None:
    tokenizer = load_tokenizer(demo_model())
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    plain = Case(id="a", messages=messages, check=[Check(exact="x")])
    text = tokenizer.decode(encode_prompt(plain, tokenizer))
    assert text.startswith("<|system|>\nBe brief.<|end|>") and text.endswith("<|assistant|>\n")
    with_tools = Case(id="a", messages=messages, tools=tools, check=[Check(exact="x")])
    with pytest.raises(InputError, match="leaves the tools out"):
        encode_prompt(with_tools, tokenizer)
    tokenizer.chat_template = (
        "{% for t in tools or [] %}[{{ t['function']['name'] }}]{% endfor %}"
        + tokenizer.chat_template
    )
    assert tokenizer.decode(encode_prompt(with_tools, tokenizer)).startswith("[look]<|system|>")


CHOICE = {"choice": {"options": ["a", "b"], "expected": "a"}}
GOOD = {"id": "a", "prompt": "p", "check": {"exact": "x"}}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "isn't valid JSON"),
        ("[]", "valid dictionary"),
        (json.dumps({**GOOD, "id": "first"}), "id: 'first' is used twice"),
        (json.dumps({**GOOD, "check": {}}), "check: needs one of exact, contains"),
        (json.dumps({**GOOD, "check": []}), "check: list should have at least 1 item"),
        (
            json.dumps({**GOOD, "check": {"exakt": "x"}}),
            "check.exakt: unknown key; did you mean exact",
        ),
        (json.dumps({**GOOD, "check": {"regex": "("}}), "check: regex '(' doesn't compile"),
        (
            json.dumps({**GOOD, "check": [{"exact": "a"}, {"exact": 3}]}),
            "check.1.exact: input should",
        ),
        (json.dumps({**GOOD, "check": {"json_schema": "no.json"}}), "no.json can't be read"),
        (json.dumps({**GOOD, "check": {"python": "os:getcwd"}}), "check.python: runs code"),
        (json.dumps({**GOOD, "check": {"max_tokens": 32}}), "max_tokens 32 can't fail"),
        (
            json.dumps(
                {
                    **GOOD,
                    "check": {"exact": "a", "choice": {"options": ["a", "b"], "expected": "a"}},
                }
            ),
            "choice must be the only check",
        ),
        (json.dumps({**GOOD, "messages": [{"role": "user"}]}), "needs prompt or messages"),
        (json.dumps({**GOOD, "prompt": ""}), "needs prompt or messages"),
        (json.dumps({"id": "a", "check": {"exact": "x"}}), "needs prompt or messages"),
        (json.dumps({"id": "a", "messages": [{}], "check": {"exact": "x"}}), "needs a role"),
        (json.dumps({**GOOD, "tools": [{}]}), "tools needs messages"),
        (json.dumps({**GOOD, "max_new_tokens": 0}), "max_new_tokens: input should be greater"),
        (json.dumps({**GOOD, "weight": 0}), "weight: input should be greater"),
        (json.dumps({**GOOD, "critical": "yes"}), "critical: input should be a valid boolean"),
        (json.dumps({"id": "a", "prompt": "p"}), "check is missing"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text(json.dumps({**GOOD, "id": "first"}) + "\n\n" + line + "\n")
    with pytest.raises(InputError) as caught:
        load_cases(path)
    assert str(caught.value).startswith(f"{path}:3: ") and message in str(caught.value)


def test_all_mistakes_are_listed_at_once(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    bad = [{**GOOD, "id": f"c{i}", "check": {"regex": "("}, "weight": "heavy"} for i in range(6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in bad))
    with pytest.raises(InputError) as caught:
        load_cases(path)
    lines = str(caught.value).split("\n")
    assert len(lines) == 11 and lines[-1] == "and 2 more"
    for number in range(1, 6):
        assert sum(line.startswith(f"{path}:{number}: ") for line in lines) == 2


def test_code_runs_where_it_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "allowed_checks.py").write_text(
        "def upper(answer, case): return answer.isupper()\n"
    )
    path = tmp_path / "cases.jsonl"
    path.write_text(json.dumps({**GOOD, "check": {"python": "allowed_checks:upper"}}))
    with pytest.raises(InputError, match="--allow-code"):
        load_cases(path)
    (case,) = load_cases(path, allow_code=True)
    assert judge_answers([case], [Answer("YES")], [Answer("no")]).fixed == 1


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_byte_order_mark_before_cases_is_none_of_their_text(tmp_path: Path, newline: str) -> None:
    path = tmp_path / "cases.jsonl"
    lines = [json.dumps({**GOOD, "id": name}) for name in ("a", "b")]
    path.write_text(newline.join(lines), encoding="utf-8-sig", newline="")
    assert [case.id for case in load_cases(path)] == ["a", "b"]
    assert len(case_inputs(path)) == 2


@pytest.mark.parametrize("shape", ["lines", "array", "csv", "utf-16"])
def test_no_byte_order_mark_enters_a_prompt(tmp_path: Path, shape: str) -> None:
    path = tmp_path / "cases"
    cases: list[dict[str, Any]] = [
        {"id": "a", "prompt": "\ufeffHello", "check": {"exact": "x"}},
        {
            "id": "b",
            "messages": [{"role": "user", "content": "\ufeffHello"}],
            "check": {"exact": "x"},
        },
    ]
    lines = "".join("\ufeff" + json.dumps(case) + "\n" for case in cases)
    if shape == "csv":
        rows = (
            [case.get(key, "") for key in ("id", "prompt", "messages", "check")] for case in cases
        )
        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerow(["id", "prompt", "messages", "check"])
        writer.writerows(
            [cell if isinstance(cell, str) else json.dumps(cell) for cell in row] for row in rows
        )
        lines = "\ufeff" + table.getvalue()
    if shape == "array":
        lines = "\ufeff" + json.dumps(cases)
    path.write_text(lines, encoding="utf-16-le" if shape == "utf-16" else "utf-8")
    first, second = load_cases(path)
    assert first.prompt == "Hello" and first.check[0].exact == "x"
    assert second.messages == [{"role": "user", "content": "Hello"}]
    assert next(iter(case_inputs(path))).prompt == "Hello"


def test_no_cases_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text("\n")
    with pytest.raises(InputError, match="is empty"):
        load_cases(path)
    with pytest.raises(InputError, match="no such file"):
        load_cases(tmp_path / "nowhere.jsonl")


def test_cases_become_text_for_reports(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text(
        '{"id": "a", "prompt": "2 + 2 =", "check": {"number": 4, "tolerance": 0.5}}\n\n'
        '{"id": "b", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", '
        '"content": "Hi"}], "check": [{"contains": "Hello"}, {"max_tokens": 5}]}\n'
    )
    first, second = case_inputs(path)
    assert (first.prompt, first.expected) == ("2 + 2 =", "number: 4; tolerance: 0.5")
    assert second.prompt == "system: Be brief.\n\nuser: Hi"
    assert second.expected == "contains: Hello; max_tokens: 5"


def test_prompts_options_and_answers_must_fit_the_model(tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "cases.jsonl", load_tokenizer(demo_model())
    choice = {"choice": {"options": ["a", "b " * 50], "expected": "a"}}
    lines = [
        {"id": "short", "prompt": "The owl", "check": {"exact": "x"}, "max_new_tokens": 30},
        {"id": "cut", "prompt": "The owl", "check": {"exact": "x"}, "max_new_tokens": 60},
        {"id": "long", "prompt": "The owl. " * 40, "check": {"exact": "x"}},
        {"id": "option", "prompt": "The owl", "check": choice},
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    cases = load_cases(path)
    for fixed, numbers in ((True, [2, 3, 4]), (False, [3, 4])):
        with pytest.raises(InputError) as caught:
            check_prompts(cases, tokenizer, Limits(1024, 40, fixed))
        problems = str(caught.value).split("\n")
        assert [problem.split(": ")[0] for problem in problems] == [f"{path}:{n}" for n in numbers]
    check_prompts(cases, tokenizer, Limits(1024, None))
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}:1 holds the token"):
        check_prompts(cases, tokenizer, Limits(100, None))
