"""What an unfinished output directory holds, so that no whole piece of work is done twice.

``OUT.partial/unfinished/journal.jsonl`` has a line with the digests of everything that decides
the bytes, and then a line for every finished step, written after what it stands for. A line that
a kill cut short counts for nothing. Beside it lies what is needed to go on.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from quantkit.base.errors import InputError, MachineError, QuantkitError
from quantkit.base.files import as_machine_error
from quantkit.base.output import partial_of, replace_output
from quantkit.base.progress import Progress

_SCRATCH, _FILE = "unfinished", "journal.jsonl"
_DONE = {"done": True}
Step = dict[str, Any]


class Journal:
    """The steps that are finished, and the file that says so.

    steps: those of an earlier run and of this one; scratch: a directory for what is needed to
    go on, which will be gone in the end.
    """

    def __init__(self, file: IO[bytes], steps: list[Step], scratch: Path) -> None:
        self.steps = steps
        self.scratch = scratch
        self._file = file

    @property
    def done(self) -> bool:
        """Whether everything is finished but the name of the directory."""
        return self.steps[-1:] == [_DONE]

    def record(self, step: Step) -> None:
        """Say that ``step`` is finished: whatever it names must lie on disk."""
        self._file.write(json.dumps(step, separators=(",", ":")).encode() + b"\n")
        self.steps.append(step)

    def forget(self) -> None:
        """Count nothing as finished: what was found is damaged."""
        self._file.seek(0)
        end = len(self._file.readline())
        self._file.truncate(end)
        self._file.seek(end)
        self.steps = []


@contextmanager
def unfinished(
    out: Path, inputs: Mapping[str, str], *, force: bool, progress: Progress
) -> Iterator[tuple[Path, Journal]]:
    """``OUT.partial``, new or as an earlier run left it, and its journal.

    Becomes ``out`` when the block ends well. When it doesn't, finished steps are kept, unless the
    inputs were at fault. ``inputs``: digests by what they are of; where an earlier run had others,
    it is left alone (InputError), or with ``force`` thrown away.
    """
    partial = partial_of(out)
    try:
        file, steps = _open(partial, inputs, force=force)
    except OSError as error:
        raise as_machine_error(error, partial) from error
    journal = Journal(file, steps, partial / _SCRATCH)
    if steps:
        progress.note(f"{partial}: going on after {len(steps)} finished steps")
    try:
        with file:
            yield partial, journal
            if not journal.done:
                journal.record(_DONE)
        for path in journal.scratch.iterdir():
            if path.name != _FILE:
                path.unlink()
        shutil.rmtree(journal.scratch)
        replace_output(out)
    except BaseException as error:
        failure = as_machine_error(error, partial) if isinstance(error, OSError) else error
        at_fault = isinstance(failure, QuantkitError) and not isinstance(failure, MachineError)
        if at_fault or not journal.steps:
            shutil.rmtree(partial, ignore_errors=True)
        else:
            kept = f"{len(journal.steps)} finished steps are kept in {partial}"
            progress.note(f"{kept}: the same command goes on from there")
        if failure is error:
            raise
        raise failure from error


def _open(partial: Path, inputs: Mapping[str, str], *, force: bool) -> tuple[IO[bytes], list[Step]]:
    path = partial / _SCRATCH / _FILE
    if path.is_file():
        file = path.open("r+b", buffering=0)
        _lock(file, partial)
        try:
            found, steps, whole = _read(file)
            if differing := _differing(found, inputs):
                raise InputError(
                    f"holds unfinished work of other inputs; what differs: {differing}",
                    subject=str(partial),
                    fix="Give the same inputs to go on, or --force to start again.",
                )
        except InputError:
            if not force:
                file.close()
                raise
        else:
            file.truncate(whole)
            file.seek(whole)
            return file, steps
        file.close()
    if partial.exists():
        shutil.rmtree(partial)
    path.parent.mkdir(parents=True)
    file = path.open("w+b", buffering=0)
    _lock(file, partial)
    file.write(json.dumps({"inputs": dict(inputs)}).encode() + b"\n")
    return file, []


def _lock(file: IO[bytes], partial: Path) -> None:
    """Until the file is closed no other run may work here."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(
            "another run is at work here", where=str(partial), fix="Wait for it, or stop it."
        ) from None


def _read(file: IO[bytes]) -> tuple[dict[str, str], list[Step], int]:
    """The inputs, the steps and where the last whole line ends."""
    lines = file.read().split(b"\n")[:-1]  # what follows the last line's end was cut short
    try:
        values = [json.loads(line) for line in lines]
        found = dict(values[0]["inputs"])
    except (ValueError, LookupError, TypeError):
        return {"journal": "damaged"}, [], 0
    return found, values[1:], sum(len(line) + 1 for line in lines)


def _differing(found: Mapping[str, str], inputs: Mapping[str, str]) -> str:
    names = [name for name in {**found, **inputs} if found.get(name) != inputs.get(name)]
    return ", ".join(names)
