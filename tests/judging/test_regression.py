"""Regression: answers are generated or scored, checked on both sides, and counted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from quantkit.base.resources import demo_model
from quantkit.calibration.text import load_tokenizer
from quantkit.checkpoint.end_tokens import end_tokens
from quantkit.engines import transformers as hf
from quantkit.judging.answers import Answer
from quantkit.judging.cases import Case
from quantkit.judging.checks import Check, Choice
from quantkit.judging.regression import answer_cases, judge_answers


def answers_of(*texts: str) -> list[Answer]:
    return [Answer(text) for text in texts]


def test_broken_and_fixed_cases_are_counted() -> None:
    cases = [
        Case(id=str(i), prompt="p", check=[Check(exact="yes")], critical=i == 0, weight=1.0 + i)
        for i in range(4)
    ]
    result = judge_answers(
        cases, answers_of("no", "no", "yes", "yes"), answers_of("yes", "yes", "yes", "no")
    )
    assert (result.passed, result.total, result.pass_rate) == (2, 4, 0.5)
    assert (result.broken, result.broken_critical, result.fixed) == (2, 1, 1)
    assert result.weighted_pass_rate == pytest.approx((3 + 4) / (1 + 2 + 3 + 4))


def test_all_checks_must_hold_and_each_is_kept() -> None:
    case = Case(id="a", prompt="p", check=[Check(contains="a", regex="b"), Check(contains="c")])
    (outcome,) = judge_answers([case], answers_of("ab"), answers_of("abc")).cases
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
    end = end_tokens(demo_model(), tokenizer)
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
