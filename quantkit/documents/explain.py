"""Pydantic's errors in words that name the key and help to correct it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel


def explain(
    model: type[BaseModel], problem: Any, tags: Mapping[str, type[BaseModel]] | None = None
) -> str:
    """A line about one of a ValidationError's ``errors()``: the key, what is wrong, and a fix."""
    tags = tags or {}
    location = [
        part
        for index, part in enumerate(problem["loc"])
        if not (index == 1 and part in tags) and not str(part).startswith("<")
    ]
    key = ".".join(str(part) for part in location)
    kind = problem["type"]
    given = problem.get("input")
    if kind == "extra_forbidden":
        known = _known_keys(model, problem["loc"], tags)
        close = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if kind == "missing":
        return f"{key} is missing"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        methods = ", ".join(name for name in tags if "-" not in name)
        return f"{key}.method must be one of {methods}"
    message = problem["msg"].removeprefix("Value error, ")
    where = f"{key}: " if key else ""
    if kind == "value_error":
        return f"{where}{message}"
    return f"{where}{message[0].lower()}{message[1:]}, not {given!r}"


def _known_keys(
    model: type[BaseModel], location: tuple[Any, ...], tags: Mapping[str, type[BaseModel]]
) -> list[str]:
    """The keys that the section with the key at ``location`` may have."""
    current: Any = model
    for part in location[:-1]:
        if isinstance(part, int) or part.startswith("<"):
            continue
        if part in tags:
            current = tags[part]
            continue
        field = next((f for n, f in current.model_fields.items() if (f.alias or n) == part), None)
        if field is None:
            return []
        current = next((a for a in _flatten(field.annotation) if issubclass(a, BaseModel)), current)
    return sorted(field.alias or name for name, field in current.model_fields.items())


def _flatten(annotation: Any) -> list[type]:
    """All classes in an annotation, which may be nested, such as ``list[Gate] | None``."""
    arguments = getattr(annotation, "__args__", ())
    if not arguments:
        return [annotation] if isinstance(annotation, type) else []
    return [inner for argument in arguments for inner in _flatten(argument)]
