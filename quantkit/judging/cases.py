"""Regression cases: prompts with checks of the answers, read from a file of records."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from quantkit.base.errors import InputError
from quantkit.calibration.text import render_chat
from quantkit.documents.explain import explain
from quantkit.documents.forms import messages_of, without_mark
from quantkit.documents.records import Record, Records, first_line, listed, read_records
from quantkit.documents.text import lone_surrogate, surrogate_message
from quantkit.judging.checks import Check
from quantkit.model.limits import Limits
from quantkit.results.comparison import CaseInput


def _prompt(value: Any) -> Any:
    return without_mark(value) if isinstance(value, str) else value


def _messages(value: Any) -> Any:
    return messages_of(value) if isinstance(value, list) else value


class Case(BaseModel):
    """A prompt or chat messages, and the checks that the answer must pass."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: str
    prompt: Annotated[str | None, BeforeValidator(_prompt)] = None
    messages: Annotated[list[dict[str, Any]] | None, BeforeValidator(_messages)] = None
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
    _where: str = ""

    @property
    def where(self) -> str:
        """The case's file and line; its id where it wasn't read from a file."""
        return self._where or self.id

    @model_validator(mode="before")
    @classmethod
    def _has_whole_characters(cls, value: Any) -> Any:
        if (text := lone_surrogate(value)) is not None:
            raise ValueError(surrogate_message(text))
        return value

    @model_validator(mode="after")
    def _can_be_asked(self) -> Case:
        if bool(self.prompt) == bool(self.messages):
            raise ValueError("needs prompt or messages, and not both")
        for message in self.messages or ():
            if not isinstance(message.get("role"), str):
                raise ValueError("each of messages needs a role")
        if self.tools is not None and not self.messages:
            raise ValueError("tools needs messages: a chat template shows them to the model")
        return self

    @model_validator(mode="after")
    def _checks_agree(self) -> Case:
        if self.choice is not None and sum(len(check.names) for check in self.check) > 1:
            raise ValueError(
                "choice must be the only check: its options are scored, none is generated"
            )
        for check in self.check:
            if check.max_tokens is not None and check.max_tokens >= self.max_new_tokens:
                raise ValueError(
                    f"check.max_tokens {check.max_tokens} can't fail: "
                    f"answers end at max_new_tokens {self.max_new_tokens}"
                )
        return self

    @property
    def choice(self) -> list[str] | None:
        """The options to choose from; None where the answer is generated."""
        return next((c.choice.options for c in self.check if c.choice is not None), None)


def _value(record: Record) -> Any:
    return record.value


def load_cases(path: Path, *, allow_code: bool = False) -> list[Case]:
    """Read a file of cases, with the schemas and functions that their checks name.

    allow_code: whether ``python`` checks may be imported and run. Raises InputError that lists the
    first ten mistakes, each with its line and key.
    """
    found = read_records(path)
    if found.text is not None:
        raise InputError(
            f"holds {found.shape}, and no cases; its first line is {first_line(found.text)}",
            subject=str(path),
            fix="Write a case a line, as JSON: docs/suites.md has every key.",
        )
    return cases_of(found, path, allow_code=allow_code)


def cases_of(
    found: Records, path: Path, *, allow_code: bool, parse: Callable[[Record], Any] = _value
) -> list[Case]:
    """The cases in the records of the file at ``path``, as ``load_cases`` gives them.

    parse: turns a record into the keys of a case; it may raise ValueError.
    """
    cases: dict[str, Case] = {}
    problems: list[tuple[str, str]] = []
    for record in found.records:
        try:
            if record.problem is not None:
                raise _Malformed([record.problem])
            case = _case(parse, record, path.parent, allow_code)
            case._where = record.where
            if case.id in cases:
                raise _Malformed([f"id: {case.id!r} is used twice"])
            cases[case.id] = case
        except _Malformed as error:
            problems += [(record.where, problem) for problem in error.problems]
    if problems:
        raise listed(problems, "docs/suites.md has every key.")
    if not cases:
        raise InputError("holds no cases", subject=str(path))
    return list(cases.values())


class _Malformed(Exception):
    """All that is wrong with one line."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


def _case(
    parse: Callable[[Record], Any], record: Record, directory: Path, allow_code: bool
) -> Case:
    try:
        value = parse(record)
    except ValueError as error:
        raise _Malformed([str(error)]) from error
    try:
        case = Case.model_validate(value)
    except ValidationError as error:
        single = isinstance(value, dict) and isinstance(value.get("check"), dict)
        raise _Malformed([_explain(problem, single) for problem in error.errors()]) from error
    if not allow_code and any(check.python is not None for check in case.check):
        raise _Malformed(["check.python: runs code of the suite, which --allow-code must allow"])
    try:
        checks = [check.resolve(directory) for check in case.check]
    except ValueError as error:
        raise _Malformed([f"check: {error}"]) from error
    return case.model_copy(update={"check": checks})


def _explain(problem: Any, single: bool) -> str:
    """A problem with its key; ``single``: the file has one check in place of a list of them."""
    text = explain(Case, problem)
    # The model has made a list of the single check, whose index the file's author never wrote.
    return text.replace("check.0", "check", 1) if single and text.startswith("check.0") else text


def encode_prompt(case: Case, tokenizer: Any) -> list[int]:
    """Token ids of a case's prompt, up to where the answer begins.

    Messages go through the chat template. Raises InputError where it refuses them.
    """
    return _encode(case, tokenizer, "")


def _encode(case: Case, tokenizer: Any, continuation: str) -> list[int]:
    if case.messages is None:
        ids: list[int] = tokenizer.encode(f"{case.prompt}{continuation}")
        return ids
    text = render_chat(
        case.messages, tokenizer, case.where, add_generation_prompt=True, tools=case.tools
    )
    ids = tokenizer.encode(text + continuation, add_special_tokens=False)
    return ids


def check_prompts(cases: Sequence[Case], tokenizer: Any, limits: Limits) -> None:
    """Raise InputError for prompts, options and answers that the model has no room or ids for.

    It lists the first ten that are too long, each with its line.
    """
    problems: list[tuple[str, str]] = []
    for case in cases:
        sequences = [encode_prompt(case, tokenizer)]
        new_tokens = case.max_new_tokens
        if case.choice is not None:
            sequences = [ids for ids, _ in encode_options(case, tokenizer, case.choice)]
            new_tokens = 1
        for ids in sequences:
            limits.check_ids(ids, tokenizer, case.where)
        if why := limits.too_long(max(map(len, sequences)), new_tokens):
            problems.append((case.where, why))
    if problems:
        raise listed(problems, "Shorten the prompts, or lower max_new_tokens.")


def encode_options(
    case: Case, tokenizer: Any, options: Sequence[str]
) -> list[tuple[list[int], int]]:
    """For each option, the token ids of prompt and option, and how many at their end are scored.

    Raises InputError where the prompt leaves no token before the options.
    """
    prompt = encode_prompt(case, tokenizer)
    # Prompt and option are tokenized as one text, since a token may hold the prompt's last space
    # and the option's first word. So what all of these texts begin with counts as the prompt.
    wholes = [_encode(case, tokenizer, option) for option in options]
    longest = min(len(prompt), *(len(whole) - 1 for whole in wholes))
    columns = zip(prompt[:longest], *wholes, strict=False)
    shared = next((n for n, ids in enumerate(columns) if len(set(ids)) > 1), longest)
    if shared < 1:
        raise InputError("leaves no token before its options", subject=case.where)
    return [(whole, len(whole) - shared) for whole in wholes]


def case_inputs(path: Path) -> tuple[CaseInput, ...]:
    """The cases of a file as text for a report; ``load_cases`` must accept the file."""
    return tuple(_input(record.value) for record in read_records(path).records)


def _input(case: dict[str, Any]) -> CaseInput:
    messages = case.get("messages") or ()
    parts = [f"{message.get('role')}: {_content(message)}" for message in messages]
    if tools := case.get("tools"):
        parts.insert(0, f"tools: {_json(tools)}")
    checks = case.get("check", ())
    expected = [
        f"{name}: {value if isinstance(value, str) else _json(value)}"
        for check in ([checks] if isinstance(checks, dict) else checks)
        for name, value in check.items()
    ]
    return CaseInput(
        case["id"], without_mark(case.get("prompt") or "\n\n".join(parts)), "; ".join(expected)
    )


def _content(message: dict[str, Any]) -> str:
    """A message's text, with tool calls and parts that aren't text as JSON."""
    rest = {key: value for key, value in message.items() if key not in ("role", "content")}
    content = message.get("content")
    text = content if isinstance(content, str) else _json(content) if content else ""
    return f"{text}\n{_json(rest)}".strip() if rest else text


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
