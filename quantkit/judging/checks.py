"""What an answer must be: the checks of regression cases, each with the reason why it failed."""

from __future__ import annotations

import difflib
import importlib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from quantkit.judging.schemas import check_schema, compile_path, faults, read_schema

# A sign counts where no word or number ends before it: "5-3" is 5 and 3.
_NUMBER = re.compile(r"(?:(?<![\w.)])[-+])?\d+(?:,\d{3})*(?:\.\d+)?(?:[eE][-+]?\d+)?")

# How assistants decline in English. Heuristic: a model that declines otherwise needs its own
# phrases, which ``refuses`` takes as a list.
_REFUSAL = re.compile(
    r"\b(?:i|we)\s+(?:can't|cannot|can not|couldn't|could not|won't|will not|refuse|decline"
    r"|must (?:decline|refuse)|(?:am|are) (?:unable|not able|not allowed)|(?:do not|don't) feel)\b"
    r"|\b(?:i'm|we're)\s+(?:unable|not able|not allowed)\b"
    r"|\b(?:unable|not able|not allowed)\s+to\s+(?:help|assist|comply|provide|answer|fulfil)"
    r"|\bas an? (?:ai|(?:large )?language model)\b",
    re.IGNORECASE,
)

Function = Callable[[str, dict[str, Any]], Any]


@dataclass(frozen=True)
class Answer:
    """What a model said.

    text: without special tokens, or the option chosen; tokens: how many it took; scores: of a
    choice's options, log-likelihoods in nats.
    """

    text: str
    tokens: int = 0
    scores: tuple[float, ...] = ()


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Choice(_Strict):
    """Options of which the expected one must be the likeliest after the prompt.

    per_character: log-likelihoods are divided by the options' lengths, as lm-eval's acc_norm is.
    """

    options: Annotated[list[str], Field(min_length=2)]
    expected: str
    per_character: bool = False

    @model_validator(mode="after")
    def _is_a_choice(self) -> Choice:
        if self.expected not in self.options:
            raise ValueError(f"expected {self.expected!r} is none of the options")
        if len(set(self.options)) < len(self.options) or not all(self.options):
            raise ValueError("options must differ, and none may be empty")
        return self

    def best(self, scores: Sequence[float]) -> str:
        """The option that the scores are highest for; the first of equals."""
        weighed = [
            score / len(option) if self.per_character else score
            for score, option in zip(scores, self.options, strict=True)
        ]
        return self.options[weighed.index(max(weighed))]


class Similarity(_Strict):
    """Likeness to a recorded answer, or to the baseline's where none is given.

    It is 2·M/T over words: M words in common, in order, of T on both sides (difflib's ratio).
    """

    min: Annotated[float, Field(gt=0, le=1)]
    to: str | None = None


def similarity(one: str, other: str) -> float:
    """Likeness of two texts by their words, 0 to 1; case counts, white space doesn't."""
    matcher = difflib.SequenceMatcher(None, one.split(), other.split(), autojunk=False)
    return matcher.ratio()


def _with_min(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return {"min": value} if number else value


def _phrases(value: Any) -> Any:
    """True stands for the phrases that are known."""
    if value is False:
        raise ValueError("must be true, or a list of phrases")
    return [] if value is True else value


def _schema_or_path(value: Any) -> Any:
    if not isinstance(value, dict | str):
        raise ValueError("must be a JSON Schema, or the path of one")
    return value


class Check(_Strict):
    """What an answer must be; ``docs/suites.md`` has each key. Several given must all hold."""

    exact: str | None = None
    contains: str | None = None
    regex: str | None = None
    number: float | None = None
    tolerance: Annotated[float, Field(ge=0)] | None = None
    json_schema: Annotated[Any, BeforeValidator(_schema_or_path)] = None
    json_path: Annotated[dict[str, Any], Field(min_length=1)] | None = None
    choice: Choice | None = None
    similarity: Annotated[Similarity, BeforeValidator(_with_min)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    refuses: Annotated[list[str], BeforeValidator(_phrases)] | None = None
    does_not_refuse: Annotated[list[str], BeforeValidator(_phrases)] | None = None
    python: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = None

    @model_validator(mode="after")
    def _can_be_held(self) -> Check:
        if not self.names:
            raise ValueError(f"needs one of {', '.join(_CHECKS)}")
        if self.tolerance is not None and self.number is None:
            raise ValueError("tolerance needs number")
        if self.regex is not None:
            try:
                re.compile(self.regex)
            except re.error as error:
                raise ValueError(f"regex {self.regex!r} doesn't compile: {error}") from error
        if isinstance(self.json_schema, dict):
            check_schema(self.json_schema)
        for path in self.json_path or ():
            compile_path(path)
        return self

    @cached_property
    def names(self) -> list[str]:
        """The checks that are given."""
        return [name for name in _CHECKS if getattr(self, name) is not None]

    def resolve(self, directory: Path) -> Check:
        """The check with its schema read and its function imported; paths from ``directory``.

        Raises ValueError.
        """
        if isinstance(self.json_schema, str):
            schema = read_schema(directory / self.json_schema)
            return self.model_copy(update={"json_schema": schema}).resolve(directory)
        if self.python is not None:
            load_function(self.python, directory)
        return self

    def outcomes(
        self, answer: Answer, baseline: Answer, case: Mapping[str, Any]
    ) -> dict[str, str | None]:
        """Why each of the checks fails, by its name; None where it holds.

        baseline: the baseline's answer; case: what a ``python`` function is told of it.
        """
        return {name: _CHECKS[name](self, answer, baseline, case) for name in self.names}


def load_function(name: str, directory: Path) -> Function:
    """The function of a ``python`` check, from a module in ``directory`` or installed.

    Raises ValueError when it can't be imported.
    """
    module, _, function = name.partition(":")
    folder = str(directory.resolve())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # a user's module may raise anything as it is imported
        raise ValueError(f"{name} can't be imported ({type(error).__name__}: {error})") from error
    if not callable(found):
        raise ValueError(f"{name} isn't a function")
    result: Function = found
    return result


def _quoted(text: str, limit: int = 80) -> str:
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")


def _exact(check: Check, answer: Answer, *_: Any) -> str | None:
    if answer.text.strip() == str(check.exact).strip():
        return None
    return f"is not {_quoted(str(check.exact))}"


def _contains(check: Check, answer: Answer, *_: Any) -> str | None:
    return None if str(check.contains) in answer.text else f"lacks {_quoted(str(check.contains))}"


def _regex(check: Check, answer: Answer, *_: Any) -> str | None:
    return None if re.search(str(check.regex), answer.text) else f"no match of {check.regex}"


def _number(check: Check, answer: Answer, *_: Any) -> str | None:
    found = _NUMBER.findall(answer.text)
    if not found:
        return "holds no number"
    value = float(found[-1].replace(",", ""))
    if check.number is not None and abs(value - check.number) <= (check.tolerance or 0):
        return None
    return f"last number is {value:g}, not {check.number:g}"


def _json(answer: Answer) -> Any:
    """The JSON value that an answer is; a Markdown fence around it is allowed."""
    text = answer.text.strip()
    if fenced := re.fullmatch(r"```\w*\n(.*?)\n?```", text, re.DOTALL):
        text = fenced[1]
    return json.loads(text)


def _json_schema(check: Check, answer: Answer, *_: Any) -> str | None:
    assert isinstance(check.json_schema, dict)  # a path has been resolved
    try:
        return faults(check.json_schema, _json(answer))
    except json.JSONDecodeError as error:
        return f"isn't JSON ({error})"


def _json_path(check: Check, answer: Answer, *_: Any) -> str | None:
    try:
        value = _json(answer)
    except json.JSONDecodeError as error:
        return f"isn't JSON ({error})"
    for text, expected in (check.json_path or {}).items():
        path = compile_path(text)
        found: Any = path.findall(value)
        if path.singular_query():
            if not found:
                return f"{text} isn't there"
            found = found[0]
        if found != expected or isinstance(found, bool) != isinstance(expected, bool):
            return f"{text} is {_quoted(json.dumps(found))}, not {_quoted(json.dumps(expected))}"
    return None


def _choice(check: Check, answer: Answer, *_: Any) -> str | None:
    assert check.choice is not None
    if answer.text == check.choice.expected:
        return None
    scores = dict(zip(check.choice.options, answer.scores, strict=True))
    chosen, expected = answer.text, check.choice.expected
    return f"{_quoted(chosen)} ({scores[chosen]:.2f}) is likelier than {_quoted(expected)} " + (
        f"({scores[expected]:.2f})"
    )


def _similarity(check: Check, answer: Answer, baseline: Answer, *_: Any) -> str | None:
    assert check.similarity is not None
    reference = check.similarity.to
    found = similarity(answer.text, baseline.text if reference is None else reference)
    if found >= check.similarity.min:
        return None
    return f"similarity is {found:.3f}, at least {check.similarity.min:g} is wanted"


def _max_tokens(check: Check, answer: Answer, *_: Any) -> str | None:
    assert check.max_tokens is not None
    if answer.tokens <= check.max_tokens:
        return None
    return f"is longer than {check.max_tokens} tokens"


def _refusal(answer: Answer, phrases: list[str] | None) -> str | None:
    """What an answer declines with; None where it doesn't."""
    text = answer.text.replace("’", "'")
    if phrases:
        return next((p for p in phrases if p.casefold() in text.casefold()), None)
    found = _REFUSAL.search(text)
    return found[0] if found else None


def _refuses(check: Check, answer: Answer, *_: Any) -> str | None:
    return None if _refusal(answer, check.refuses) else "doesn't refuse"


def _does_not_refuse(check: Check, answer: Answer, *_: Any) -> str | None:
    found = _refusal(answer, check.does_not_refuse)
    return f"refuses: {_quoted(found)}" if found else None


def _python(check: Check, answer: Answer, _: Answer, case: Mapping[str, Any]) -> str | None:
    name = str(check.python)
    module, _colon, function = name.partition(":")
    try:
        said = getattr(sys.modules[module], function)(answer.text, dict(case))
    except Exception as error:  # an answer that its code can't read is a failed check
        return f"{name} raised {type(error).__name__}: {error}"
    passed, why = said if isinstance(said, tuple) else (said, f"{name} says no")
    return None if passed else str(why)


_CHECKS: dict[str, Callable[[Check, Answer, Answer, Mapping[str, Any]], str | None]] = {
    "exact": _exact,
    "contains": _contains,
    "regex": _regex,
    "number": _number,
    "json_schema": _json_schema,
    "json_path": _json_path,
    "choice": _choice,
    "similarity": _similarity,
    "max_tokens": _max_tokens,
    "refuses": _refuses,
    "does_not_refuse": _does_not_refuse,
    "python": _python,
}
