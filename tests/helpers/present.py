"""Values that a test knows not to be None, known to the type checker too."""

from __future__ import annotations

from typing import TypeVar

Value = TypeVar("Value")


def present(value: Value | None) -> Value:
    """The value, which isn't None."""
    assert value is not None
    return value
