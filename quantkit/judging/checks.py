"""What the answer to a regression case must be: the checks that a suite may ask for."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from quantkit.judging.schemas import check_schema, compile_path, read_schema

# From an answer and its case to whether it passes, or to that and the reason.
Function = Callable[[str, dict[str, Any]], Any]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Choice(_Strict):
    """Options of which the expected one must be the likeliest after the prompt.

    per_character: log-likelihoods are divided by the options' lengths, as lm-eval's acc_norm does.
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
        """The option with the highest score, the first of equals; ``scores`` in options' order."""
        weighed = [
            score / len(option) if self.per_character else score
            for score, option in zip(scores, self.options, strict=True)
        ]
        return self.options[weighed.index(max(weighed))]


class Similarity(_Strict):
    """The least similarity, 0 to 1, to a recorded answer, or to the baseline's if ``to`` is None.

    ``answers.similarity`` defines the measure.
    """

    min: Annotated[float, Field(gt=0, le=1)]
    to: str | None = None


def _with_min(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return {"min": value} if number else value


def _phrases(value: Any) -> Any:
    """A list of phrases; true becomes the empty list, which means the phrases known here."""
    if value is False:
        raise ValueError("must be true, or a list of phrases")
    return [] if value is True else value


def _schema_or_path(value: Any) -> Any:
    if not isinstance(value, dict | str):
        raise ValueError("must be a JSON Schema, or the path of one")
    return value


class Check(_Strict):
    """One or more checks of an answer, all of which must pass; docs/suites.md describes each."""

    exact: str | None = None
    contains: str | None = None
    regex: str | None = None
    number: float | None = None
    tolerance: Annotated[float, Field(ge=0)] | None = None  # of number
    json_schema: Annotated[Any, BeforeValidator(_schema_or_path)] = None
    json_path: Annotated[dict[str, Any], Field(min_length=1)] | None = None
    choice: Choice | None = None
    similarity: Annotated[Similarity, BeforeValidator(_with_min)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    refuses: Annotated[list[str], BeforeValidator(_phrases)] | None = None
    does_not_refuse: Annotated[list[str], BeforeValidator(_phrases)] | None = None
    python: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = None

    @model_validator(mode="after")
    def _is_well_formed(self) -> Check:
        if not self.names:
            raise ValueError(f"needs one of {', '.join(self._known())}")
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

    @classmethod
    def _known(cls) -> list[str]:
        return [name for name in cls.model_fields if name != "tolerance"]

    @cached_property
    def names(self) -> list[str]:
        """The names of the checks that are given."""
        return [name for name in self._known() if getattr(self, name) is not None]

    def resolve(self, directory: Path) -> Check:
        """This check with its schema read and its function imported.

        Paths are relative to ``directory``. Raises ValueError for what can't be read or imported.
        """
        if isinstance(self.json_schema, str):
            schema = read_schema(directory / self.json_schema)
            return self.model_copy(update={"json_schema": schema}).resolve(directory)
        if self.python is not None:
            load_function(self.python, directory)
        return self


def load_function(name: str, directory: Path) -> Function:
    """The function of a ``python`` check, MODULE:FUNCTION, from ``directory`` or as installed.

    ``directory`` stays on sys.path. Raises ValueError when there is no such function.
    """
    module, _, function = name.partition(":")
    folder = str(directory.resolve())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        loaded = getattr(importlib.import_module(module), function)
    except Exception as error:  # a user's module may raise anything as it is imported
        raise ValueError(f"{name} can't be imported ({type(error).__name__}: {error})") from error
    if not callable(loaded):
        raise ValueError(f"{name} isn't a function")
    result: Function = loaded
    return result
