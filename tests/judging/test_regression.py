"""Regression cases: what moved, what a model is asked, and every mistake with its line."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.base.errors import InputError
from quantkit.base.resources import demo_model
from quantkit.calibration.text import load_tokenizer
from quantkit.engines import transformers as hf
from quantkit.judging.answers import Answer
from quantkit.judging.cases import Case, encode_prompt, load_cases
from quantkit.judging.checks import Check, Choice
from quantkit.judging.regression import answer_cases, judge_answers


def said(*texts: str) -> list[Answer]:
    return [Answer(text) for text in texts]


def test_what_moved_is_counted() -> None:
    cases = [
        Case(id=str(i), prompt="p", check=[Check(exact="yes")], critical=i == 0, weight=1.0 + i)
        for i in range(4)
    ]
    result = judge_answers(cases, said("no", "no", "yes", "yes"), said("yes", "yes", "yes", "no"))
    assert (result.passed, result.total, result.pass_rate) == (2, 4, 0.5)
    assert (result.broken, result.broken_critical, result.fixed) == (2, 1, 1)
    assert result.weighted_pass_rate == pytest.approx((3 + 4) / (1 + 2 + 3 + 4))


def test_all_checks_must_hold_and_each_is_kept() -> None:
    case = Case(id="a", prompt="p", check=[Check(contains="a", regex="b"), Check(contains="c")])
    (outcome,) = judge_answers([case], said("ab"), said("abc")).cases
    assert not outcome.passed and outcome.baseline_passed
    kept = [(check.check, check.passed, check.why) for check in outcome.checks]
    assert kept == [
        ("contains", True, None),
        ("regex", True, None),
        ("contains", False, "lacks 'c'"),
    ]
    assert all(check.baseline_passed for check in outcome.checks)


# The model, its tokenizer, and what generates and scores with it.
Demo = tuple[Any, Any, Callable[..., list[list[int]]], Callable[..., list[float]]]


@pytest.fixture(scope="module")
def demo() -> Demo:
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(demo_model())
    model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32).eval()
    end = hf.end_tokens(demo_model(), tokenizer)
    return model, tokenizer, partial(hf.generate, model, end=end), partial(hf.score, model)


def test_scores_are_the_models_own_log_likelihoods(demo: Demo) -> None:
    model, tokenizer, _, score = demo
    sequences = [tokenizer.encode(t) for t in ("the cat is black", "the owl", "the fox is red now")]
    ends = [2, 1, 3]
    with torch.inference_mode():
        for ids, end, found in zip(sequences, ends, score(sequences, ends), strict=True):
            logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            places = range(len(ids) - end, len(ids))
            assert found == pytest.approx(
                sum(float(logits[p - 1, ids[p]]) for p in places), abs=1e-4
            )


def test_a_choice_is_scored_not_generated(demo: Demo) -> None:
    _, tokenizer, generate, score = demo
    question = [{"role": "user", "content": "Is the cat black?"}]
    options = ["purple", "no", "yes"]
    choice, other = (Choice(options=options, expected=answer) for answer in ("yes", "no"))
    cases = [
        Case(id="free", messages=question, check=[Check(contains="yes")]),
        Case(id="choice", messages=question, check=[Check(choice=choice)]),
        Case(id="text", prompt="The cat is ", check=[Check(choice=other)]),
    ]
    answers = answer_cases(cases, tokenizer, generate, score)
    assert answers[1].text in ("yes", "no") and len(answers[1].scores) == 3
    assert answers[1].text == options[max(range(3), key=answers[1].scores.__getitem__)]
    assert answers[0].tokens > 0 and not answers[0].scores
    # what is scored ends with the option, whatever the tokenizer does at its border
    whole = tokenizer.encode("The cat is yes")
    assert len(answers[2].scores) == 3 and len(whole) > 1


def test_messages_go_through_the_template_with_system_prompt_and_tools(demo: Demo) -> None:
    _, tokenizer, *_ = demo
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    plain = Case(id="a", messages=messages, check=[Check(exact="x")])
    text = tokenizer.decode(encode_prompt(plain, tokenizer))
    assert text.startswith("<|system|>\nBe brief.<|end|>") and text.endswith("<|assistant|>\n")
    with_tools = Case(id="a", messages=messages, tools=tools, check=[Check(exact="x")])
    with pytest.raises(InputError, match="leaves tools out"):
        encode_prompt(with_tools, tokenizer)
    kept = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% for t in tools or [] %}[{{ t['function']['name'] }}]{% endfor %}" + kept
    )
    try:
        assert tokenizer.decode(encode_prompt(with_tools, tokenizer)).startswith("[look]<|system|>")
    finally:
        tokenizer.chat_template = kept


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
        (json.dumps({"id": "a", "prompt": "p"}), "check: missing"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text(json.dumps({**GOOD, "id": "first"}) + "\n\n" + line + "\n")
    with pytest.raises(InputError) as caught:
        load_cases(path)
    assert str(caught.value).startswith(f"{path}:3: ") and message in str(caught.value)


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
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
    assert judge_answers([case], said("YES"), said("no")).fixed == 1


def test_no_cases_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text("\n")
    with pytest.raises(InputError, match="holds no cases"):
        load_cases(path)
    with pytest.raises(InputError, match="can't be read"):
        load_cases(tmp_path / "nowhere.jsonl")
