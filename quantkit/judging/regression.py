"""Regression: a model answers the cases, and its answers are judged beside the baseline's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from quantkit.judging.answers import Answer, check_answer
from quantkit.judging.cases import Case, encode_options, encode_prompt
from quantkit.results.regression import CaseOutcome, CheckOutcome, RegressionResult

# From prompts and the most tokens to generate for each, to the generated tokens.
Generate = Callable[[Sequence[list[int]], Sequence[int]], list[list[int]]]
# From sequences and how many tokens at their ends to score, to log-likelihoods in nats.
Score = Callable[[Sequence[list[int]], Sequence[int]], list[float]]


def answer_cases(
    cases: Sequence[Case], tokenizer: Any, generate: Generate, score: Score
) -> list[Answer]:
    """One model's answers, in the order of the cases.

    A choice's options are scored, and its answer is the likeliest; other answers are what
    ``generate`` makes of the prompts.
    """
    open_cases = [case for case in cases if case.choice is None]
    generated = generate(
        [encode_prompt(case, tokenizer) for case in open_cases],
        [case.max_new_tokens for case in open_cases],
    )
    answers = {
        case.id: Answer(tokenizer.decode(ids, skip_special_tokens=True), len(ids))
        for case, ids in zip(open_cases, generated, strict=True)
    }
    # The options of all cases are scored in one call, which lets the engine fill its batches.
    encoded = [(c, encode_options(c, tokenizer, c.choice)) for c in cases if c.choice is not None]
    flat = [pair for _, pairs in encoded for pair in pairs]
    scores = iter(score([ids for ids, _ in flat], [length for _, length in flat]))
    for case, pairs in encoded:
        choice = next(check.choice for check in case.check if check.choice is not None)
        own = tuple(next(scores) for _ in pairs)
        answers[case.id] = Answer(choice.best(own), scores=own)
    return [answers[case.id] for case in cases]


def judge_answers(
    cases: Sequence[Case],
    answers: Sequence[Answer],
    baseline_answers: Sequence[Answer],
    slice_cases: int = 5,
) -> RegressionResult:
    """Check the answers of both models; all three sequences have the same order.

    slice_cases: the fewest cases that a tag must have to be a slice.
    """
    return RegressionResult(
        tuple(
            _outcome(case, answer, baseline)
            for case, answer, baseline in zip(cases, answers, baseline_answers, strict=True)
        ),
        slice_cases,
    )


def _outcome(case: Case, answer: Answer, baseline: Answer) -> CaseOutcome:
    keys = case.model_dump(mode="json", exclude_none=True)
    checks = []
    for check in case.check:
        why = check_answer(check, answer, baseline, keys)
        baseline_why = check_answer(check, baseline, baseline, keys)
        checks += [
            CheckOutcome(
                check=name,
                passed=why[name] is None,
                baseline_passed=baseline_why[name] is None,
                why=why[name],
                baseline_why=baseline_why[name],
            )
            for name in check.names
        ]
    return CaseOutcome(
        id=case.id,
        passed=all(check.passed for check in checks),
        baseline_passed=all(check.baseline_passed for check in checks),
        critical=case.critical,
        tags=tuple(case.tags),
        answer=answer.text,
        baseline_answer=baseline.text,
        weight=case.weight,
        checks=tuple(checks),
    )
