"""A model's answer to a regression case, and the reasons why it fails the case's checks."""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.judging.checks import Check
from quantkit.judging.schemas import compile_path, schema_error

# A sign counts where no word or number ends before it: "5-3" holds 5 and 3.
_NUMBER = re.compile(r"(?:(?<![\w.)])[-+])?\d+(?:,\d{3})*(?:\.\d+)?(?:[eE][-+]?\d+)?")

# How assistants decline in English. This is a heuristic: for a model that declines in other words,
# ``refuses`` takes a list of its phrases.
_REFUSAL = re.compile(
    r"\b(?:i|we)\s+(?:can't|cannot|can not|couldn't|could not|won't|will not|refuse|decline"
    r"|must (?:decline|refuse)|(?:am|are) (?:unable|not able|not allowed)|(?:do not|don't) feel)\b"
    r"|\b(?:i'm|we're)\s+(?:unable|not able|not allowed)\b"
    r"|\b(?:unable|not able|not allowed)\s+to\s+(?:help|assist|comply|provide|answer|fulfil)"
    r"|\bas an? (?:ai|(?:large )?language model)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Answer:
    """What a model answered to one case.

    text: the generated text without special tokens, or the option chosen; tokens: how many were
    generated; scores: for a choice, the log-likelihood of each option in nats.
    """

    text: str
    tokens: int = 0
    scores: tuple[float, ...] = ()


def check_answer(
    check: Check, answer: Answer, baseline: Answer, case: Mapping[str, Any]
) -> dict[str, str | None]:
    """For each check by its name, why ``answer`` fails it, or None where it passes.

    check: resolved; baseline: the baseline's answer to the same case; case: the case's keys as a
    ``python`` check gets them.
    """
    return {name: _CHECKS[name](check, answer, baseline, case) for name in check.names}


def similarity(one: str, other: str) -> float:
    """How similar two texts are by their words, 0 to 1; case counts, white space doesn't.

    It is 2·M/T, with M the words that both have in the same order, and T the words of both texts
    together (difflib's ratio).
    """
    # autojunk would ignore the frequent words of a text of 200 words or more.
    matcher = difflib.SequenceMatcher(None, one.split(), other.split(), autojunk=False)
    return matcher.ratio()


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
    numbers = _NUMBER.findall(answer.text)
    if not numbers:
        return "holds no number"
    last = float(numbers[-1].replace(",", ""))
    if check.number is not None and abs(last - check.number) <= (check.tolerance or 0):
        return None
    return f"last number is {last:g}, not {check.number:g}"


def _json(answer: Answer) -> Any:
    """The JSON value of an answer, which may be inside a Markdown fence."""
    text = answer.text.strip()
    if fenced := re.fullmatch(r"```\w*\n(.*?)\n?```", text, re.DOTALL):
        text = fenced[1]
    return json.loads(text)


def _json_schema(check: Check, answer: Answer, *_: Any) -> str | None:
    assert isinstance(check.json_schema, dict)  # resolve() has read a path's schema
    try:
        return schema_error(check.json_schema, _json(answer))
    except json.JSONDecodeError as error:
        return f"isn't JSON ({error})"


def _json_path(check: Check, answer: Answer, *_: Any) -> str | None:
    try:
        value = _json(answer)
    except json.JSONDecodeError as error:
        return f"isn't JSON ({error})"
    for text, expected in (check.json_path or {}).items():
        path = compile_path(text)
        selected: Any = path.findall(value)
        if path.singular_query():
            if not selected:
                return f"{text} isn't there"
            selected = selected[0]
        # Python's True equals 1, JSON's true doesn't.
        if selected != expected or isinstance(selected, bool) != isinstance(expected, bool):
            given, wanted = _quoted(json.dumps(selected)), _quoted(json.dumps(expected))
            return f"{text} is {given}, not {wanted}"
    return None


def _choice(check: Check, answer: Answer, *_: Any) -> str | None:
    assert check.choice is not None
    chosen, expected = answer.text, check.choice.expected
    if chosen == expected:
        return None
    scores = dict(zip(check.choice.options, answer.scores, strict=True))
    return (
        f"{_quoted(chosen)} ({scores[chosen]:.2f}) is likelier than "
        f"{_quoted(expected)} ({scores[expected]:.2f})"
    )


def _similarity(check: Check, answer: Answer, baseline: Answer, *_: Any) -> str | None:
    assert check.similarity is not None
    reference = check.similarity.to
    value = similarity(answer.text, baseline.text if reference is None else reference)
    if value >= check.similarity.min:
        return None
    return f"similarity is {value:.3f}, at least {check.similarity.min:g} is wanted"


def _max_tokens(check: Check, answer: Answer, *_: Any) -> str | None:
    assert check.max_tokens is not None
    if answer.tokens <= check.max_tokens:
        return None
    return f"is longer than {check.max_tokens} tokens"


def _refusal(answer: Answer, phrases: list[str] | None) -> str | None:
    """The words by which an answer declines; None where it doesn't."""
    text = answer.text.replace("’", "'")
    if phrases:
        return next((p for p in phrases if p.casefold() in text.casefold()), None)
    match = _REFUSAL.search(text)
    return match[0] if match else None


def _refuses(check: Check, answer: Answer, *_: Any) -> str | None:
    return None if _refusal(answer, check.refuses) else "doesn't refuse"


def _does_not_refuse(check: Check, answer: Answer, *_: Any) -> str | None:
    words = _refusal(answer, check.does_not_refuse)
    return f"refuses: {_quoted(words)}" if words else None


def _python(check: Check, answer: Answer, _: Answer, case: Mapping[str, Any]) -> str | None:
    name = str(check.python)
    module, _colon, function = name.partition(":")
    try:
        result = getattr(sys.modules[module], function)(answer.text, dict(case))
    except Exception as error:  # an answer that its code can't read is a failed check
        return f"{name} raised {type(error).__name__}: {error}"
    passed, why = result if isinstance(result, tuple) else (result, f"{name} says no")
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
