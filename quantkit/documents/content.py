"""What a file of text holds, whatever its name: read once, unpacked, and decoded."""

from __future__ import annotations

import bz2
import codecs
import gzip
import hashlib
import lzma
import os
import re
import stat
import zlib
from dataclasses import dataclass
from pathlib import Path

from quantkit.base.contents import lfs_pointer
from quantkit.base.errors import InputError, not_installed
from quantkit.base.files import sha256, with_home

# What packed files begin with.
_PACKINGS = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "bzip2": re.compile(rb"BZh[1-9]1AY&SY"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd"),
}
# UTF-32's mark begins with that of UTF-16, so it is looked for first.
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
MARK = "\ufeff"  # the byte order mark, as a character
_BINARY = {
    b"PK\x03\x04": "a zip archive",
    b"%PDF-": "a PDF",
    b"GGUF": "a GGUF model",
    b"ARROW1": "an Arrow table",
    b"SQLite format 3": "an SQLite database",
}
# Pipes that were read, by what identifies one as long as nothing more is written to it.
_pipes: dict[tuple[int, int, int], bytes] = {}


@dataclass(frozen=True)
class Content:
    """The bytes of a file, unpacked. packing: how they were packed, None where they weren't."""

    data: bytes
    digest: str
    packing: str | None


def locate_file(name: str, directory: Path) -> Path:
    """The absolute path of a file named relative to ``directory``.

    Links are followed, unless to a pipe, such as /dev/stdin, which has a name only as a link.
    Raises InputError for a name that no file can have.
    """
    if "\0" in name:
        raise InputError("holds a NUL, which no file's name has", subject=repr(name))
    path = directory / with_home(name)
    try:
        special = not stat.S_ISREG(path.stat().st_mode) and not path.is_dir()
    except OSError:
        special = False
    return Path(os.path.abspath(path)) if special else path.resolve()


def is_pipe(path: Path) -> bool:
    """Whether there is a pipe at ``path``, as a shell makes for ``<(command)``."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def check_readable(path: Path) -> None:
    """Raise InputError where there is no file or pipe at ``path``."""
    if path.is_dir():
        raise InputError(
            "is a folder, and a file is wanted",
            subject=str(path),
            fix=f"Name one of its files; or write dataset: {{hub: {path}}} for a folder in the "
            "form of a data set of the Hub.",
        )
    if not path.exists():
        raise missing_file(path)


def missing_file(path: Path) -> InputError:
    """The error for a file that isn't there."""
    return InputError(
        "no such file" if path.suffix else "no such file or folder",
        where=str(path),
        fix="Paths in a YAML file are relative to that file; in one that comes through a pipe, to "
        "the working directory.",
    )


def read_bytes(path: Path) -> bytes:
    """The bytes of a file, or of a pipe, which is read once and remembered.

    Raises InputError where it can't be read.
    """
    check_readable(path)
    try:
        if path.is_file():
            return path.read_bytes()
        if (known := _pipes.get(_identity(path))) is not None:
            return known
        data = path.read_bytes()
        _pipes[_identity(path)] = data
        return data
    except OSError as error:
        raise InputError(f"can't be read ({error.strerror or error})", subject=str(path)) from error


def _identity(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    # A named pipe that is written to again has new content; a terminal's time changes by itself.
    written = status.st_mtime_ns if stat.S_ISFIFO(status.st_mode) else 0
    return status.st_dev, status.st_ino, written


def digest_of_file(path: Path) -> str:
    """The sha256 of a file or a pipe as it is, packed or not. Raises InputError."""
    check_readable(path)
    return sha256(path) if path.is_file() else hashlib.sha256(read_bytes(path)).hexdigest()


def read_content(path: Path) -> Content:
    """A file's bytes, unpacked where they are gzip's, bzip2's, xz's or zstd's.

    Raises InputError where it can't be read or unpacked, and for a Git LFS pointer; MachineError
    for zstd without pyarrow.
    """
    raw = read_bytes(path)
    if pointer := lfs_pointer(raw, path, "data set"):
        raise pointer
    packing = next((name for name, begin in _PACKINGS.items() if begin.match(raw)), None)
    data = raw if packing is None else _unpacked(raw, packing, path)
    return Content(data, hashlib.sha256(raw).hexdigest(), packing)


def _unpacked(raw: bytes, packing: str, path: Path) -> bytes:
    unpack = {"gzip": gzip.decompress, "bzip2": bz2.decompress, "xz": lzma.decompress}
    try:
        return unpack[packing](raw) if packing in unpack else _unzstd(raw)
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise InputError(
            f"can't be unpacked: its {packing} data is damaged or cut short ({error})",
            subject=str(path),
        ) from error


def _unzstd(raw: bytes) -> bytes:
    try:
        import pyarrow
    except ImportError:
        raise not_installed("pyarrow", "datasets") from None
    data: bytes = pyarrow.CompressedInputStream(pyarrow.BufferReader(raw), "zstd").read()
    return data


def decode(data: bytes, path: Path) -> str:
    """Text, by its byte order mark or else as UTF-8; marks are left out, of later lines too.

    Raises InputError for what isn't text.
    """
    mark = next((mark for mark in _MARKS if data.startswith(mark)), b"")
    encoding = _MARKS.get(mark, "utf-8")
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        if known := next((k for begin, k in _BINARY.items() if data.startswith(begin)), None):
            raise _not_text(path, f"is {known}, and no text") from error
        line = data.count(b"\n", 0, len(mark) + error.start) + 1
        raise InputError(
            f"can't be read as {encoding.upper()} text ({error.reason} in line {line})",
            subject=str(path),
            fix=f"Save it as UTF-8, for Western text: iconv -f WINDOWS-1252 -t UTF-8 {path}",
        ) from error
    if text.count("\x00") * 100 > len(text):
        raise _not_text(path, "holds binary data, and no text")
    # Files with a mark that were put one after the other have one inside.
    return re.sub(f"^{MARK}+", "", text, flags=re.MULTILINE) if MARK in text else text


def _not_text(path: Path, what: str) -> InputError:
    return InputError(
        what,
        subject=str(path),
        fix="Give plain text in UTF-8, JSON, JSON lines, CSV or Parquet; gzip, bzip2, xz and zstd "
        "are unpacked.",
    )
