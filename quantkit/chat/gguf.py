"""What a GGUF file says of chatting: its template, special tokens and context length.

The header is read here: gguf-py's reader takes seconds for a vocabulary of 150,000 tokens.
Layout and keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from quantkit.base.errors import InputError

_NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_ENDS = ("eos", "eot", "eom")
_NUMBERS = "BbHhIif?"  # by type, 0 to 7
_STRING, _ARRAY = 8, 9
_WIDE = {10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class ChatMetadata:
    """template: Jinja source, None for a model that has none; tokens: the special ones, by the
    names that templates use; ends: texts of the tokens that end an answer; adds_bos: whether the
    engine puts BOS before a prompt by itself; context: tokens that the model was trained on."""

    template: str | None
    tokens: dict[str, str]
    ends: tuple[str, ...]
    adds_bos: bool
    context: int | None


def read_chat(path: Path) -> ChatMetadata:
    """Read a file's chat metadata. Raises InputError for a file that isn't GGUF."""
    try:
        with path.open("rb") as file:
            values = _header(file)
    except (struct.error, ValueError, KeyError, OverflowError) as error:
        raise InputError(f"isn't a readable GGUF file ({error})", subject=str(path)) from error
    vocabulary = values.get("tokenizer.ggml.tokens", [])

    def token(name: str) -> str | None:
        number = values.get(f"tokenizer.ggml.{name}_token_id")
        return vocabulary[number] if number is not None and number < len(vocabulary) else None

    named = {f"{name}_token": token(key) for name, key in _NAMED.items()}
    adds_bos = values.get("tokenizer.ggml.add_bos_token")
    if adds_bos is None:  # llama.cpp's default
        adds_bos = values.get("tokenizer.ggml.model") == "llama"
    return ChatMetadata(
        template=values.get("tokenizer.chat_template"),
        tokens={name: text for name, text in named.items() if text is not None},
        ends=tuple(dict.fromkeys(text for text in map(token, _ENDS) if text is not None)),
        adds_bos=bool(adds_bos),
        context=values.get(f"{values.get('general.architecture')}.context_length"),
    )


def _header(file: IO[bytes]) -> dict[str, Any]:
    """The metadata by key; arrays of anything but texts are passed over, as empty lists.

    Raises struct.error, ValueError or KeyError for what isn't GGUF.
    """

    def number(code: str) -> Any:
        return struct.unpack(f"<{code}", file.read(struct.calcsize(f"<{code}")))[0]

    def text() -> str:
        size = number("Q")
        data = file.read(size) if size < 1 << 30 else b""
        if len(data) != size:
            raise ValueError("a text goes beyond its end")
        return data.decode("utf-8", errors="replace")

    def array() -> list[str]:
        kind, count = number("I"), number("Q")
        if kind == _STRING:
            return [text() for _ in range(count)]
        file.seek(count * struct.calcsize(_code(kind)), 1)
        return []

    readers: dict[int, Callable[[], Any]] = {_STRING: text, _ARRAY: array}
    if (magic := file.read(4)) != b"GGUF" or (version := number("I")) not in (2, 3):
        raise ValueError(f"begins with {magic!r}" if magic != b"GGUF" else f"version {version}")
    number("Q")  # tensors
    values = {}
    for _ in range(number("Q")):
        key, kind = text(), number("I")
        values[key] = readers[kind]() if kind in readers else number(_code(kind))
    return values


def _code(kind: int) -> str:
    """The letter that struct has for a number's type."""
    return _NUMBERS[kind] if kind < len(_NUMBERS) else _WIDE[kind]
