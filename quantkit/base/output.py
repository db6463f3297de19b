"""Output directories that are never seen half-made: built as ``OUT.partial``, then renamed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantkit.base.errors import InputError, MachineError
from quantkit.base.files import as_machine_error


def check_output(out: Path, kind: str, sign: str, *, force: bool, needed: int = 0) -> None:
    """Refuse an output directory that exists, unless ``force`` may replace it, and a full disk.

    kind: what will be made there, such as "an artifact"; sign: the name of a file that every
    directory of this kind holds; needed: bytes. Even ``force`` replaces nothing but an empty
    directory or one with that file. Changes nothing. Raises InputError or MachineError.
    """
    _check_replaceable(out, kind, sign, force=force)
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise MachineError(
            f"the disk has {free / 1e9:.2f} GB free; this needs {needed / 1e9:.2f} GB",
            where=str(parent),
            fix="Free some space, or choose another --out.",
        )


def _check_replaceable(out: Path, kind: str, sign: str, *, force: bool) -> None:
    if not out.exists():
        return
    if not force:
        raise InputError(
            "exists already", subject=str(out), fix="Choose another --out, or pass --force."
        )
    if not out.is_dir() or (any(out.iterdir()) and not (out / sign).is_file()):
        raise InputError(
            f"isn't {kind} of ours (no {sign}), so --force doesn't replace it",
            subject=str(out),
            fix="Choose another --out, or remove it yourself.",
        )


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory that appears at ``out`` when the block ends well, and not at all otherwise.

    One already there, which ``check_output`` has allowed, is replaced at that moment.
    Raises MachineError when the disk is full or the place can't be written.
    """
    partial = partial_of(out)
    try:
        if partial.exists():  # left by a run that was killed
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        yield partial
        replace_output(out)
    except OSError as error:
        raise as_machine_error(error, out) from error
    finally:
        if partial.exists():
            shutil.rmtree(partial, ignore_errors=True)


def partial_of(out: Path) -> Path:
    """Where ``out`` is built."""
    return out.with_name(out.name + ".partial")


def replace_output(out: Path) -> None:
    """Rename ``OUT.partial`` to ``out``, and remove the directory that had that name."""
    old = out.with_name(out.name + ".old")
    if old.exists():  # left by a run that was killed
        shutil.rmtree(old)
    if out.exists():  # renamed first, so that a kill leaves one whole directory or the other
        out.rename(old)
    partial_of(out).rename(out)
    if old.exists():
        shutil.rmtree(old)
