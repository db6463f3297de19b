"""Small files and digests: JSON, text that appears whole, sha256, and writes at a place."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from io import FileIO
from pathlib import Path
from threading import Lock, Thread
from typing import Any

from quantkit.base.contents import mistaken_content
from quantkit.base.errors import InputError, MachineError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CUT_SHORT = re.compile(r"requested and \d+ written")
_FIXES = {
    errno.EACCES: "Check its owner and permissions.",
    errno.EPERM: "Check its owner and permissions.",
    errno.EROFS: "Choose a place on a file system that can be written.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ENOTDIR: "A part of the path is a file: choose another path.",
}
_CHUNK = 1 << 20  # bytes read at a time, at least


def paths(given: str | Path | Sequence[str | Path]) -> list[Path]:
    """One path or several, each ``with_home``."""
    several = [given] if isinstance(given, str | Path) else given
    return [with_home(path) for path in several]


def with_home(path: str | Path) -> Path:
    """``path``, where a ``~`` or ``~USER`` at its start is that user's home directory.

    Shells leave it as it is in ``--out=~/x``, and Python too. Raises InputError for a ``~`` of a
    user without a home; a name that begins with ``~`` and is no user's stays as it is.
    """
    path = Path(path)
    try:
        return path.expanduser()
    except RuntimeError:
        if path.parts[0] != "~":
            return path
        raise InputError(
            "the home directory isn't known",
            where=str(path),
            fix="Set HOME, or give the path without ~.",
        ) from None


def is_file_name(name: str) -> bool:
    """Whether the system could have a file of this name, which JSON or YAML gave."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:  # half of a character
        return False


def openable(path: Path) -> Path:
    """``path``, or a link to it where its name isn't UTF-8: some libraries open no other names.

    The links are removed when the process ends.
    """
    if _is_utf8(path):
        return path
    if _is_utf8(path.name) and not path.is_dir():
        return openable(path.parent) / path.name
    link = Path(_links().name, hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:16])
    link = link.with_suffix(path.suffix if _is_utf8(path.suffix) else "")
    with suppress(FileExistsError):
        link.symlink_to(path.absolute())
    return link


def _is_utf8(name: str | Path) -> bool:
    return not _SURROGATE.search(str(name))


@functools.cache
def _links() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="quantkit-")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises InputError that names the file (and line) if it isn't one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("no such file", where=str(path)) from None
    except (ValueError, RecursionError) as error:  # of bytes, of JSON, and of its depth
        if mistaken := mistaken_content(path):
            raise mistaken from error
        raise InputError(f"isn't valid JSON ({error})", subject=str(path)) from error
    if not isinstance(value, dict):
        raise InputError("holds no JSON object", subject=str(path))
    return value


def read_optional_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, or return an empty one where there is no such file."""
    return read_json(path) if path.is_file() else {}


_SURROGATE = re.compile("[\ud800-\udfff]")


def json_text(value: object, *, ascii_only: bool = False) -> str:
    """Readable JSON, the same text for the same value."""
    text = json.dumps(value, indent=2, ensure_ascii=ascii_only) + "\n"
    # UTF-8 has no form for half a character, as in names that aren't UTF-8; JSON's escapes have.
    return _SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def write_json(path: Path, value: object) -> None:
    """Write readable JSON, the same bytes for the same value."""
    path.write_text(json_text(value), encoding="utf-8")


def write_whole(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all, and its directory where needed.

    Raises MachineError where it can't be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Names of files in it keep their bytes.
        partial.write_text(text, encoding="utf-8", errors="surrogateescape")
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise as_machine_error(error, path) from error


def write_at(file: FileIO, offset: int, data: memoryview | bytes) -> None:
    """Write all of ``data`` from ``offset`` on."""
    view = memoryview(data).cast("B") if len(data) else memoryview(b"")
    file.seek(offset)
    done = 0
    while done < len(view):  # an unbuffered file may take less than it is given
        done += file.write(view[done:])


def sha256(path: Path) -> str:
    """Hex digest of a file. Remembered as long as the file's size and times stay the same."""
    # Commands ask for the same weights several times: sweep once a recipe, and all again to verify.
    status = path.stat()
    key = path.absolute(), status.st_size, status.st_mtime_ns, status.st_ctime_ns
    with _lock:
        known = _digests.get(key)
        if known is None:
            ours = _digests[key] = Future()
            for other in list(_digests)[:-_REMEMBERED]:
                del _digests[other]
    if known is not None:  # or will be soon: another thread is at it
        return known.result()
    try:
        ours.set_result(_sha256(path, status.st_size))
    except BaseException as error:
        with _lock:
            _digests.pop(key, None)
        ours.set_exception(error)
        raise
    return ours.result()


_lock = Lock()
_digests: dict[tuple[Path, int, int, int], Future[str]] = {}
_REMEMBERED = 1024  # files


def _sha256(path: Path, size: int) -> str:
    digest = hashlib.sha256()
    # After each piece this thread may wait for one that runs Python, so that pieces are large.
    buffer = memoryview(bytearray(min(max(size // 64, _CHUNK), 16 * _CHUNK)))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def hash_ahead(paths: Iterable[Path]) -> None:
    """Begin to compute digests that ``sha256`` will be asked for, beside other work."""
    waiting = iter(sorted(paths, key=lambda path: -path.stat().st_size))
    taking = Lock()

    def work() -> None:
        while True:
            with taking:
                path = next(waiting, None)
            if path is None:
                return
            with suppress(OSError):  # whoever asks for the digest will see it
                sha256(path)

    for _ in range(max(1, (os.cpu_count() or 1) // 2)):
        # A command that ends early doesn't wait for them.
        Thread(target=work, daemon=True).start()


def digests(paths: Iterable[Path], root: Path | None = None) -> dict[str, str]:
    """sha256 of files, by their names, or by their paths from ``root`` on."""
    paths = list(paths)
    names = [path.name if root is None else path.relative_to(root).as_posix() for path in paths]
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(sha256, paths), strict=True))


def holds(path: Path, start: int, nbytes: int, digest: str) -> bool:
    """Whether the ``nbytes`` of a file from ``start`` on are there and have this sha256."""
    if not path.is_file():
        return False
    actual, left = hashlib.sha256(), nbytes
    with path.open("rb") as file:
        file.seek(start)
        while left and (data := file.read(min(left, _CHUNK))):
            actual.update(data)
            left -= len(data)
    return not left and actual.hexdigest() == digest


def as_machine_error(error: OSError, place: Path) -> MachineError:
    """The error to report for a read or write that the system refused."""
    reason, fix = error.strerror or str(error) or type(error).__name__, None
    # numpy reports a write that stopped short without an errno.
    if error.errno in _FULL or (error.errno is None and _CUT_SHORT.search(reason)):
        what = f"no space left to write ({reason})"
        fix = "Free some space (or raise the file size limit) and run it again."
    elif error.errno is None:
        what = reason
    else:
        what = f"can't be read or written ({reason})"
        fix = _FIXES.get(error.errno)
    return MachineError(what, where=str(error.filename or place), fix=fix)
