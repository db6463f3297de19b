"""Regression cases: prompts with checks, answered greedily by baseline and artifact."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from quantkit.calibration.text import render_chat
from quantkit.errors import InputError
from quantkit.results import CaseOutcome, RegressionResult

# A sign counts where no word or number ends before it: "5-3" is 5 and 3.
_NUMBER = re.compile(r"(?:(?<![\w.)])[-+])?\d+(?:,\d{3})*(?:\.\d+)?(?:[eE][-+]?\d+)?")


class Check(BaseModel):
    """What an answer must be. Several given at once must all hold.

    exact: the answer without surrounding space; contains: a part of it; regex: found in it;
    number: its last number, give or take ``tolerance``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    exact: str | None = None
    contains: str | None = None
    regex: str | None = None
    number: float | None = None
    tolerance: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _checks_something(self) -> Check:
        if all(v is None for v in (self.exact, self.contains, self.regex, self.number)):
            raise ValueError("needs exact, contains, regex or number")
        if self.regex is not None:
            try:
                re.compile(self.regex)
            except re.error as error:
                raise ValueError(f"regex {self.regex!r} doesn't compile: {error}") from error
        return self

    def holds(self, answer: str) -> bool:
        """Whether ``answer`` passes."""
        if self.exact is not None and answer.strip() != self.exact.strip():
            return False
        if self.contains is not None and self.contains not in answer:
            return False
        if self.regex is not None and not re.search(self.regex, answer):
            return False
        if self.number is not None:
            found = _NUMBER.findall(answer)
            if not found:
                return False
            return abs(float(found[-1].replace(",", "")) - self.number) <= self.tolerance
        return True


class Case(BaseModel):
    """One prompt, or chat messages, and its check."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    check: Check
    max_new_tokens: Annotated[int, Field(ge=1)] = 32
    critical: bool = False
    tags: list[str] = []

    @model_validator(mode="after")
    def _one_input(self) -> Case:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("needs prompt or messages, one of them")
        return self


def load_cases(path: Path) -> list[Case]:
    """Read a JSONL file of cases. Raises InputError with the line of the first bad one."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"can't be read ({error})", where=str(path)) from error
    cases: dict[str, Case] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            case = Case.model_validate(json.loads(line))
        except json.JSONDecodeError as error:
            raise InputError(f"isn't valid JSON ({error})", where=where) from error
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(str(part) for part in problem["loc"])
            message = problem["msg"].removeprefix("Value error, ")
            raise InputError(f"{key}: {message}" if key else message, where=where) from error
        if case.id in cases:
            raise InputError(f"id {case.id!r} is used twice", where=where)
        cases[case.id] = case
    if not cases:
        raise InputError("holds no cases", where=str(path))
    return list(cases.values())


def encode_prompt(case: Case, tokenizer: Any) -> list[int]:
    """Token ids of a case's prompt; messages through the chat template, ready for the answer."""
    if case.messages is not None:
        text = render_chat(case.messages, tokenizer, case.id, add_generation_prompt=True)
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids
    ids = tokenizer.encode(case.prompt)
    return ids


Generate = Callable[[Sequence[list[int]], Sequence[int]], list[list[int]]]


def answer(cases: Sequence[Case], tokenizer: Any, generate: Generate) -> list[str]:
    """The answers of one model, greedy, as text without special tokens."""
    prompts = [encode_prompt(case, tokenizer) for case in cases]
    made = generate(prompts, [case.max_new_tokens for case in cases])
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in made]


def judge(
    cases: Sequence[Case],
    answers: Sequence[str],
    baseline_answers: Sequence[str],
    slice_cases: int = 5,
) -> RegressionResult:
    """Check both sides' answers. Tags with at least ``slice_cases`` cases are slices."""
    return RegressionResult(
        tuple(
            CaseOutcome(
                case.id,
                case.check.holds(mine),
                case.check.holds(theirs),
                case.critical,
                tuple(case.tags),
                mine,
                theirs,
            )
            for case, mine, theirs in zip(cases, answers, baseline_answers, strict=True)
        ),
        slice_cases,
    )
