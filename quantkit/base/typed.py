"""Dataclasses out of JSON, with an error for every key that isn't what it should be."""

from __future__ import annotations

from typing import Any, TypeVar

from quantkit.base.errors import InputError

T = TypeVar("T")


def typed(kind: type[T], value: object, where: str, *, fix: str | None = None) -> T:
    """The ``kind`` of dataclass that a JSON value describes.

    Keys that the dataclass doesn't have are left out, so that a later version may add some.
    Raises InputError that names ``where`` (the file), the key and what is wrong with it.
    """
    from pydantic import TypeAdapter, ValidationError  # here: it takes a while to import

    adapter: TypeAdapter[T] = TypeAdapter(kind)
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise InputError(_what(error.errors()[0]), where=where, fix=fix) from error


def _what(problem: Any) -> str:
    # Tags of a union are written in <>: they are no keys of the file.
    parts = [str(part) for part in problem["loc"] if not str(part).startswith("<")]
    key = ".".join(parts) or "the file"
    if problem["type"] == "missing":
        return f"{key} is missing"
    message = problem["msg"]
    return f"{key} is {problem['input']!r}: {message[0].lower()}{message[1:]}"
