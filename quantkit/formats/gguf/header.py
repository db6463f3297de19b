"""The header of a GGUF file: its metadata, and where its tensors are stored.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from quantkit.base.contents import mistaken_content
from quantkit.base.errors import InputError

_VERSIONS = (2, 3)
_ALIGNMENT = 32  # bytes, where general.alignment doesn't say
_STRING, _ARRAY = 8, 9
_NUMBERS = {**dict(enumerate("BbHhIif?")), 10: "Q", 11: "q", 12: "d"}  # type → struct's letter


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: shape as in torch, ``type`` by ggml's number, ``offset`` in the file."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class Header:
    """metadata: every key, arrays as lists; tensors: in the file's order; nbytes: of the file."""

    metadata: dict[str, Any]
    tensors: tuple[TensorInfo, ...]
    nbytes: int


def read_header(path: Path) -> Header:
    """Read a file's header. Raises InputError for a file that isn't GGUF, or ends within it."""
    # gguf-py's reader takes seconds for a vocabulary of 150,000 tokens.
    try:
        with path.open("rb") as file:
            return _Reader(file).header()
    except FileNotFoundError:
        raise InputError("no such file", where=str(path)) from None
    except (ValueError, KeyError) as error:
        if mistaken := mistaken_content(path):
            raise mistaken from error
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> InputError:
    """The error for a file that isn't GGUF, or is damaged."""
    return InputError(f"isn't a readable GGUF file ({error})", subject=str(path))


class _Reader:
    """Reads values one after the other. Raises ValueError or KeyError for what isn't GGUF."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._nbytes = self._left = os.fstat(file.fileno()).st_size

    def header(self) -> Header:
        if (magic := self._take(4)) != b"GGUF":
            raise ValueError(f"it begins with {magic!r}")
        if (version := self._number("I")) not in _VERSIONS:
            raise ValueError(f"version {version}")
        tensors, keys = self._number("Q"), self._number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._text()
            if key in metadata:
                raise ValueError(f"{key} is there twice")
            metadata[key] = self._value(self._number("I"))
        infos = [self._tensor() for _ in range(tensors)]
        if len({info.name for info in infos}) < len(infos):
            raise ValueError("two tensors have one name")
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment!r}, not a power of two")
        # Offsets count from the first aligned byte after the header.
        data = -(-(self._nbytes - self._left) // alignment) * alignment
        placed = [TensorInfo(i.name, i.shape, i.type, data + i.offset) for i in infos]
        return Header(metadata, tuple(placed), self._nbytes)

    def _tensor(self) -> TensorInfo:
        name = self._text()
        dimensions = [self._number("Q") for _ in range(self._number("I"))]
        return TensorInfo(name, tuple(reversed(dimensions)), self._number("I"), self._number("Q"))

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            return self._number(_NUMBERS[kind])
        kind, count = self._number("I"), self._number("Q")
        if kind in _NUMBERS:
            data = self._take(count * struct.calcsize(f"<{_NUMBERS[kind]}"))
            return list(struct.unpack(f"<{count}{_NUMBERS[kind]}", data))
        return [self._value(kind) for _ in range(count)]

    def _text(self) -> str:
        return self._take(self._number("Q")).decode("utf-8", errors="replace")

    def _number(self, letter: str) -> Any:
        code = f"<{letter}"
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _take(self, count: int) -> bytes:
        # A damaged count may be of any size: memory is taken only for what the file can hold.
        if count > self._left:
            raise ValueError("it ends within its header")
        self._left -= count
        return self._file.read(count)
