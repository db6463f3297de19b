"""JSON Schema (with jsonschema) and JSONPath (RFC 9535, with python-jsonpath) for JSON answers."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonpath import JSONPath


def read_schema(path: Path) -> dict[str, Any]:
    """The JSON Schema in a file. Raises ValueError when it can't be read or isn't a schema."""
    try:
        schema = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read ({error})") from error
    if not isinstance(schema, dict):
        raise ValueError(f"{path} holds no JSON object")
    check_schema(schema)
    return schema


def check_schema(schema: dict[str, Any]) -> None:
    """Raise ValueError unless ``schema`` is a JSON Schema that holds all that its $refs name."""
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    try:
        validator_for(schema, default=Draft202012Validator).check_schema(schema)
    except SchemaError as error:
        place = "/".join(str(part) for part in error.absolute_path)
        raise ValueError(f"isn't a JSON Schema: {place}: {error.message}") from error
    resource = DRAFT202012.create_resource(schema)
    resolver = Registry().with_resource("", resource).crawl().resolver()
    for reference in _references(schema):
        try:
            resolver.lookup(reference)
        except Unresolvable as error:
            raise ValueError(f"the JSON Schema doesn't hold $ref {reference}") from error


def schema_error(schema: dict[str, Any], value: Any) -> str | None:
    """Why ``value`` doesn't conform to the schema, its most relevant error; None where it does."""
    from jsonschema.exceptions import best_match
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing import Registry

    empty: Any = Registry()  # the default registry would download what a $ref names
    cls = validator_for(schema, default=Draft202012Validator)
    error = best_match(cls(schema, registry=empty).iter_errors(value))
    return None if error is None else f"{error.json_path}: {error.message}"


@functools.lru_cache(maxsize=256)
def compile_path(text: str) -> JSONPath:
    """The compiled path, which must begin with $. Raises ValueError when it isn't a JSONPath."""
    import jsonpath

    if not text.startswith("$"):
        raise ValueError(f"JSONPath {text!r} doesn't begin with $")
    try:
        path = jsonpath.compile(text)
    except jsonpath.JSONPathError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"JSONPath {text!r} doesn't compile: {reason}") from error
    if not isinstance(path, jsonpath.JSONPath):
        raise ValueError(f"JSONPath {text!r} is more than one path")
    return path


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"]
        for part in schema.values():
            yield from _references(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from _references(part)
