"""Text of data sets and cases: what tokenizers can't read is refused where it is read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from quantkit.base.errors import InputError

_SURROGATE = re.compile("[\ud800-\udfff]")


def lone_surrogate(value: Any) -> str | None:
    """The first text in ``value``, which JSON may hold, that has half of a character; else None."""
    return next((text for text in _texts(value) if _SURROGATE.search(text)), None)


def surrogate_message(text: str) -> str:
    """What is wrong with ``text``, which ``lone_surrogate`` gave."""
    match = _SURROGATE.search(text)
    assert match is not None
    begin = max(match.start() - 20, 0)
    around = text[begin : match.end() + 20].encode("ascii", "backslashreplace").decode()
    return f"\\u{ord(match[0]):04x} is half of a character, in: {around}"


def check_text(value: Any, where: str) -> None:
    """Raise InputError where text in ``value`` holds a lone surrogate, which no tokenizer reads."""
    if (text := lone_surrogate(value)) is not None:
        raise InputError(
            surrogate_message(text),
            where=where,
            fix="JSON writes a character beyond U+FFFF, such as an emoji, as two escapes. One of "
            "them is missing here: write the character itself, or remove the escape.",
        )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
