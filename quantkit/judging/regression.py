"""Regression cases: prompts with checks, answered greedily by baseline and artifact."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from quantkit.base.errors import InputError
from quantkit.calibration.text import render_chat
from quantkit.documents.document import explain
from quantkit.judging.checks import Answer, Check
from quantkit.results.regression import CaseOutcome, CheckOutcome, RegressionResult

_SHOWN = 10  # problems of a file that are listed


class Case(BaseModel):
    """One prompt, or chat messages, and its checks."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: str
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    check: Annotated[
        list[Check],
        Field(min_length=1),
        BeforeValidator(lambda value: [value] if isinstance(value, dict) else value),
    ]
    max_new_tokens: Annotated[int, Field(ge=1)] = 32
    weight: Annotated[float, Field(gt=0)] = 1.0
    critical: bool = False
    tags: list[str] = []

    @model_validator(mode="after")
    def _can_be_asked(self) -> Case:
        if bool(self.prompt) == bool(self.messages):
            raise ValueError("needs prompt or messages, one of them")
        for message in self.messages or ():
            if not isinstance(message.get("role"), str):
                raise ValueError("each of messages needs a role")
        if self.tools is not None and not self.messages:
            raise ValueError("tools needs messages: a chat template shows them to the model")
        return self

    @model_validator(mode="after")
    def _checks_agree(self) -> Case:
        if self.choice is not None and sum(len(check.names) for check in self.check) > 1:
            raise ValueError("choice must be the only check: nothing is answered freely")
        for check in self.check:
            if check.max_tokens is not None and check.max_tokens >= self.max_new_tokens:
                raise ValueError(
                    f"check.max_tokens {check.max_tokens} can't fail: "
                    f"answers end at max_new_tokens {self.max_new_tokens}"
                )
        return self

    @property
    def choice(self) -> list[str] | None:
        """The options, where the answer is one of some."""
        return next((c.choice.options for c in self.check if c.choice is not None), None)


def _parse(number: int, line: str) -> Any:
    return json.loads(line)


def load_cases(
    path: Path, *, allow_code: bool = False, parse: Callable[[int, str], Any] = _parse
) -> list[Case]:
    """Read a JSONL file of cases, with their schemas and functions.

    allow_code: whether ``python`` checks may be imported and run; parse: from the number and the
    text of a line to the case's keys. Raises InputError with the line and key of everything that
    is wrong, the first ten of them.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"can't be read ({error})", subject=str(path)) from error
    cases: dict[str, Case] = {}
    problems: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            case = _case(partial(parse, number, line), path.parent, allow_code)
            if case.id in cases:
                raise _Malformed([f"id: {case.id!r} is used twice"])
            cases[case.id] = case
        except _Malformed as error:
            problems += [f"{path}:{number}: {problem}" for problem in error.problems]
    if problems:
        more = len(problems) - _SHOWN
        shown = problems[:_SHOWN] + ([f"and {more} more"] if more > 0 else [])
        where, _, first = shown[0].partition(": ")
        raise InputError(
            "\n".join([first, *shown[1:]]), where=where, fix="docs/suites.md has every key."
        )
    if not cases:
        raise InputError("holds no cases", subject=str(path))
    return list(cases.values())


class _Malformed(Exception):
    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


def _case(parse: Callable[[], Any], directory: Path, allow_code: bool) -> Case:
    try:
        value = parse()
    except json.JSONDecodeError as error:
        raise _Malformed([f"isn't valid JSON ({error})"]) from error
    try:
        case = Case.model_validate(value)
    except ValidationError as error:
        one = isinstance(value, dict) and isinstance(value.get("check"), dict)
        raise _Malformed([_named(problem, one) for problem in error.errors()]) from error
    if not allow_code and any(check.python is not None for check in case.check):
        raise _Malformed(["check.python: runs code of the suite, which --allow-code must allow"])
    try:
        checks = [check.resolve(directory) for check in case.check]
    except ValueError as error:
        raise _Malformed([f"check: {error}"]) from error
    return case.model_copy(update={"check": checks})


def _named(problem: Any, one: bool) -> str:
    """A problem with its key; ``one``: the case has a check, not a list of them."""
    text = explain(Case, problem)
    return text.replace("check.0", "check", 1) if one and text.startswith("check.0") else text


def encode_prompt(case: Case, tokenizer: Any) -> list[int]:
    """Token ids of a case's prompt; messages through the chat template, ready for the answer."""
    return _encode(case, tokenizer, "")


def _encode(case: Case, tokenizer: Any, continuation: str) -> list[int]:
    if case.messages is None:
        ids: list[int] = tokenizer.encode(f"{case.prompt}{continuation}")
        return ids
    text = render_chat(
        case.messages, tokenizer, case.id, add_generation_prompt=True, tools=case.tools
    )
    ids = tokenizer.encode(text + continuation, add_special_tokens=False)
    return ids


def _options(case: Case, tokenizer: Any, options: Sequence[str]) -> list[tuple[list[int], int]]:
    """Of each option: the ids of prompt and option, and how many of them are the option's.

    Text is tokenized as a whole, since a token may hold the prompt's last space and the option's
    first word; what all of them begin with is given.
    """
    prompt = encode_prompt(case, tokenizer)
    wholes = [_encode(case, tokenizer, option) for option in options]
    longest = min(len(prompt), *(len(whole) - 1 for whole in wholes))
    columns = zip(prompt[:longest], *wholes, strict=False)
    shared = next((n for n, ids in enumerate(columns) if len(set(ids)) > 1), longest)
    if shared < 1:
        raise InputError("leaves no token before its options", subject=case.id)
    return [(whole, len(whole) - shared) for whole in wholes]


Generate = Callable[[Sequence[list[int]], Sequence[int]], list[list[int]]]
Score = Callable[[Sequence[list[int]], Sequence[int]], list[float]]


def answer(cases: Sequence[Case], tokenizer: Any, generate: Generate, score: Score) -> list[Answer]:
    """The answers of one model: greedy, as text without special tokens, or the option chosen.

    generate: from prompts and limits to new tokens; score: from sequences and the lengths of
    their ends to the log-likelihoods of these.
    """
    free = [case for case in cases if case.choice is None]
    made = generate(
        [encode_prompt(case, tokenizer) for case in free], [case.max_new_tokens for case in free]
    )
    answers = {
        case.id: Answer(tokenizer.decode(ids, skip_special_tokens=True), len(ids))
        for case, ids in zip(free, made, strict=True)
    }
    asked = [(c, _options(c, tokenizer, c.choice)) for c in cases if c.choice is not None]
    flat = [pair for _, pairs in asked for pair in pairs]
    scores = iter(score([ids for ids, _ in flat], [length for _, length in flat]))
    for case, pairs in asked:
        choice = next(check.choice for check in case.check if check.choice is not None)
        own = tuple(next(scores) for _ in pairs)
        answers[case.id] = Answer(choice.best(own), scores=own)
    return [answers[case.id] for case in cases]


def judge(
    cases: Sequence[Case],
    answers: Sequence[Answer],
    baseline_answers: Sequence[Answer],
    slice_cases: int = 5,
) -> RegressionResult:
    """Check both sides' answers. Tags with at least ``slice_cases`` cases are slices."""
    return RegressionResult(
        tuple(
            _outcome(case, mine, theirs)
            for case, mine, theirs in zip(cases, answers, baseline_answers, strict=True)
        ),
        slice_cases,
    )


def _outcome(case: Case, mine: Answer, theirs: Answer) -> CaseOutcome:
    told = case.model_dump(mode="json", exclude_none=True)
    checks = []
    for check in case.check:
        here, there = check.outcomes(mine, theirs, told), check.outcomes(theirs, theirs, told)
        checks += [
            CheckOutcome(name, here[name] is None, there[name] is None, here[name], there[name])
            for name in check.names
        ]
    return CaseOutcome(
        case.id,
        all(check.passed for check in checks),
        all(check.baseline_passed for check in checks),
        case.critical,
        tuple(case.tags),
        mine.text,
        theirs.text,
        case.weight,
        tuple(checks),
    )
