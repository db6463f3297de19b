"""Outputs that are never seen half-made, at places that were tried before the work started.

A directory is built as ``OUT.partial`` and then renamed. Where no other directory can get the name
of ``OUT`` (it is a mounted volume, the working directory, or in a directory that can't be
written), it is built in ``OUT/.partial``, and its files are moved up. A link is followed: what it
points to is written or replaced, and the link stays.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from quantkit.base.errors import InputError, MachineError
from quantkit.base.files import as_machine_error

_INSIDE = ".partial"
# What every new ext4 file system has at its top.
_NO_CONTENT = {_INSIDE, "lost+found"}


def check_output(out: Path, kind: str, sign: str, *, force: bool, needed: int = 0) -> None:
    """Refuse an output directory that isn't empty, that can't be written, or on a full disk.

    kind: what will be made there, such as "an artifact"; sign: the name of a file that every
    directory of this kind holds; needed: bytes. ``force`` may replace a directory with that file,
    and nothing else. Nothing is left changed. Raises InputError or MachineError.
    """
    try:
        _check_replaceable(out, kind, sign, force=force)
        place = _try_to_write(partial_of(out))
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise as_machine_error(error, out) from error
    if free < needed:
        raise MachineError(
            f"the disk has {free / 1e9:.2f} GB free; this needs {needed / 1e9:.2f} GB",
            where=str(place),
            fix="Free some space, or choose another --out.",
        )


def check_folder(out: Path) -> None:
    """Refuse a directory that files can't be written into. It needn't exist, and isn't made.

    Raises InputError or MachineError.
    """
    out = _followed(out)
    if out.exists() and not out.is_dir():
        raise InputError("isn't a directory", subject=str(out), fix="Choose another --out.")
    try:
        _try_to_write(out / _INSIDE)
    except OSError as error:
        raise as_machine_error(error, out) from error


def check_file(out: Path) -> None:
    """Refuse a file that can't be written. It needn't exist, and isn't made.

    Raises InputError or MachineError.
    """
    out = _followed(out)
    if out.is_dir():
        raise InputError("is a directory", subject=str(out), fix="Name a file by --out.")
    try:
        _try_to_write(out)
        if out.exists():
            out.open("ab").close()
    except OSError as error:
        raise as_machine_error(error, out) from error


def _followed(out: Path) -> Path:
    """The absolute path that ``out`` is or points to. Raises InputError where links lead nowhere.

    A link to what doesn't exist is followed too: this is how an output is put on another disk.
    """
    try:
        path = out.resolve()
        path.exists()
    except (RuntimeError, OSError) as error:  # a loop of links; which one depends on the version
        if isinstance(error, OSError) and not out.is_symlink():
            raise as_machine_error(error, out) from error
        raise InputError("is a link that leads nowhere", subject=str(out)) from None
    if path.is_symlink():
        raise InputError("is a link that leads nowhere", subject=str(out))
    # The disk that it points to may not be mounted now.
    if out.is_symlink() and not path.parent.is_dir():
        raise InputError(
            f"is a link to {path}, and there is no directory {path.parent}",
            subject=str(out),
            fix="Make that directory (or mount its disk), or choose another --out.",
        )
    return path


def _check_replaceable(out: Path, kind: str, sign: str, *, force: bool) -> None:
    path = _followed(out)
    if not path.exists() or _is_empty(path):
        return
    if not force:
        raise InputError(
            "exists already", subject=str(out), fix="Choose another --out, or pass --force."
        )
    if not (path / sign).is_file():
        raise InputError(
            f"isn't {kind} of ours (no {sign}), so --force doesn't replace it",
            subject=str(out),
            fix="Choose another --out, or remove it yourself.",
        )


def _is_empty(out: Path) -> bool:
    ignored = _NO_CONTENT if _keeps_its_name(out) else ()
    return out.is_dir() and all(path.name in ignored for path in out.iterdir())


def _try_to_write(path: Path) -> Path:
    """Make and remove a directory beside ``path``, or nearest above it where that doesn't exist.

    Returns the directory in which it was made. Raises OSError where the system refuses it:
    permissions alone don't tell, on networks and in containers.
    """
    names, place = [path.name], path.parent
    while not place.exists():
        names.append(place.name)
        place = place.parent
    # As long as the longest name that will be made, in case that is too long.
    longest = max(names, key=lambda name: len(os.fsencode(name)))
    trial = place / f"{longest[:-8]}.try{os.getpid() % 10_000:04}"
    try:
        trial.mkdir(exist_ok=True)
    finally:
        with suppress(OSError):
            trial.rmdir()
    return place


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory that appears at ``out`` when the block ends well, and not at all otherwise.

    One already there, which ``check_output`` has allowed, is replaced at that moment. Raises
    MachineError when the disk is full or the place can't be written. Where only the replacement
    fails, the finished directory is kept, and the error names it.
    """
    partial = partial_of(_followed(out))
    whole = False
    try:
        if partial.exists():  # left by a run that was killed
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        yield partial
        whole = True
        replace_output(out)
    except OSError as error:
        failure = as_machine_error(error, out)
        if whole:
            failure = MachineError(
                f"{failure.what}; the finished output is kept in {partial}",
                where=failure.where,
                fix="Move it yourself: the same command would make it again.",
            )
        raise failure from error
    finally:
        if not whole and partial.exists():
            shutil.rmtree(partial, ignore_errors=True)


def partial_of(out: Path) -> Path:
    """Where ``out`` is built."""
    out = _followed(out)
    return out / _INSIDE if _keeps_its_name(out) else out.with_name(out.name + ".partial")


def replace_output(out: Path) -> None:
    """Rename what was built to ``out``, and remove what was there. Raises OSError."""
    out = _followed(out)
    partial = partial_of(out)
    if partial.parent == out:
        _move_up(partial, out)
        return
    if not out.exists() or _is_empty(out):
        partial.rename(out)
        return
    old = _free_name(out)
    try:
        out.rename(old)  # first, so that a kill leaves one whole directory or the other
    except OSError as error:
        # A directory of a container's image can't be renamed, its files can be replaced.
        if error.errno != errno.EXDEV or out.stat().st_dev != partial.stat().st_dev:
            raise
        _move_up(partial, out)
        return
    try:
        partial.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _free_name(out: Path) -> Path:
    """``OUT.old``, or with a number where somebody has a directory of that name."""
    for number in count(1):
        old = out.with_name(f"{out.name}.old{'' if number == 1 else number}")
        if not old.exists() and not old.is_symlink():
            return old
    raise AssertionError


def _move_up(partial: Path, out: Path) -> None:
    """Put the files of ``OUT/.partial`` in the place of those of ``OUT``."""
    for path in out.iterdir():
        if path.name not in _NO_CONTENT:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    # The manifest comes last, as it is written last: without it no directory is an artifact.
    for path in sorted(partial.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        path.rename(out / path.name)
    partial.rmdir()


def _keeps_its_name(out: Path) -> bool:
    """Whether ``out`` is a directory that can't be renamed, or has no place beside it."""
    if not out.is_dir():
        return False
    parent = out.parent
    return (
        out == parent
        or _is_mounted(out)
        or out.samefile(".")  # removed, it would leave the user's shell nowhere
        or not os.access(parent, os.W_OK | os.X_OK)
        or not _may_rename(out.stat(), parent.stat())
    )


def _may_rename(status: os.stat_result, parent: os.stat_result) -> bool:
    """Whether permissions let this user rename a directory in a parent that he can write."""
    user = os.geteuid()
    return not parent.st_mode & stat.S_ISVTX or user in (0, status.st_uid, parent.st_uid)


def _is_mounted(out: Path) -> bool:
    if out.is_mount():
        return True
    # A directory of the same file system mounted here (docker -v) looks like any other but there.
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    return os.fsencode(out) in {_unescaped(line.split()[4]) for line in lines}


def _unescaped(name: bytes) -> bytes:
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), name)
