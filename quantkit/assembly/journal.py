"""The journal of an unfinished output directory, so that no finished work is done twice.

``OUT.partial/unfinished/journal.jsonl`` has a line with the digests of everything that decides
the bytes, and then a line for every finished step, written after the bytes that it describes. A
line that a kill cut short is ignored. Beside the journal are the hidden states that the next step
starts from.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

from quantkit.base.errors import InputError, MachineError, QuantkitError
from quantkit.base.files import as_machine_error
from quantkit.base.output import partial_of, replace_output
from quantkit.base.progress import Progress
from quantkit.calibration.standing import CalibrationState
from quantkit.checkpoint.written import Written
from quantkit.results.manifest import LayerReport

_SCRATCH, _FILE = "unfinished", "journal.jsonl"

# What comes before the blocks, a block, what comes after them; one more tensor of a GGUF file; and
# the whole artifact, of which only the directory's final name is missing.
Part = Literal["outside", "block", "output", "tensor", "artifact"]


@dataclass(frozen=True)
class Step:
    """A finished step.

    tensors: where what was written is; layers: how well it was quantized; importance: mean square
    of each input feature, float32 in base64, by the checkpoint key of the weight that reads it;
    routed: for an expert's weight, how many tokens were routed to it, and on how many it was
    measured;
    rescaled: keys of tensors that are kept, but for a scale; calibration: where the rows stand
    afterwards.
    """

    part: Part
    tensors: tuple[Written, ...] = ()
    layers: tuple[LayerReport, ...] = ()
    importance: Mapping[str, str] = field(default_factory=dict)
    routed: Mapping[str, Sequence[int]] = field(default_factory=dict)
    rescaled: tuple[str, ...] = ()
    calibration: CalibrationState | None = None

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Step:
        """Inverse of ``dataclasses.asdict``. Raises LookupError, TypeError for anything else."""
        state = value["calibration"]
        return cls(
            part=value["part"],
            tensors=tuple(Written(**tensor) for tensor in value["tensors"]),
            layers=tuple(LayerReport(**layer) for layer in value["layers"]),
            importance=value["importance"],
            routed=value["routed"],
            rescaled=tuple(value["rescaled"]),
            calibration=None if state is None else CalibrationState.from_json(state),
        )


class Journal:
    """The finished steps, and the file that lists them.

    steps: those of an earlier run and of this one; listed: how many of them, the first ones, are in
    the file; scratch: a directory for what the next step starts from, which is removed in the end.
    """

    def __init__(self, file: IO[bytes], steps: list[Step], scratch: Path) -> None:
        self.steps = steps
        self.listed = len(steps)
        self.scratch = scratch
        self._file = file

    @property
    def done(self) -> bool:
        """Whether everything is finished but the name of the directory."""
        return bool(self.steps) and self.steps[-1].part == "artifact"

    def record(self, step: Step) -> None:
        """Note that ``step`` is finished: the bytes that it describes must be on disk already."""
        self.hold(step)
        self.list_steps(len(self.steps))

    def hold(self, step: Step) -> None:
        """The same without listing it yet: a later run can't start after it."""
        self.steps.append(step)

    def list_steps(self, count: int, state: CalibrationState | None = None) -> None:
        """List the first ``count`` steps, after the last of which the rows stand at ``state``."""
        if count <= self.listed:
            return
        if state is not None:
            self.steps[count - 1] = replace(self.steps[count - 1], calibration=state)
        new = self.steps[self.listed : count]
        lines = [json.dumps(asdict(step), separators=(",", ":")) + "\n" for step in new]
        self._file.write("".join(lines).encode())
        self.listed = count

    def forget(self) -> None:
        """Count no step as finished, because what they wrote is damaged."""
        self._file.seek(0)
        end = len(self._file.readline())
        self._file.truncate(end)
        self._file.seek(end)
        self.steps, self.listed = [], 0


@contextmanager
def unfinished(
    out: Path, inputs: Mapping[str, str], *, force: bool, progress: Progress
) -> Iterator[tuple[Path, Journal]]:
    """``OUT.partial``, new or as an earlier run left it, and its journal.

    It is renamed to ``out`` when the block ends without an exception. Otherwise its finished steps
    are kept, unless the inputs were at fault. ``inputs``: digests, by what they are digests of.
    Where an earlier run had other inputs, its work is left alone and an InputError is raised; with
    ``force`` it is removed.
    """
    partial = partial_of(out)
    try:
        file, steps = _open(partial, inputs, force=force)
    except OSError as error:
        raise as_machine_error(error, partial) from error
    journal = Journal(file, steps, partial / _SCRATCH)
    if steps:
        progress.note(f"{partial}: continuing after {len(steps)} finished steps")
    try:
        with file:
            yield partial, journal
            if not journal.done:
                journal.record(Step("artifact"))
        _publish(out, journal.scratch)
    except BaseException as error:
        failure = as_machine_error(error, partial) if isinstance(error, OSError) else error
        at_fault = isinstance(failure, QuantkitError) and not isinstance(failure, MachineError)
        if at_fault or not journal.listed:
            shutil.rmtree(partial, ignore_errors=True)
        else:
            kept = f"{journal.listed} finished steps are kept in {partial}"
            progress.note(f"{kept}: the same command continues from there")
        if failure is error:
            raise
        raise failure from error


def _publish(out: Path, scratch: Path) -> None:
    """Remove the journal and rename the directory. Where that fails, the journal is there again."""
    for path in scratch.iterdir():
        if path.name != _FILE:
            path.unlink()
    lines = (scratch / _FILE).read_bytes()
    shutil.rmtree(scratch)
    try:
        replace_output(out)
    except OSError:
        if scratch.parent.is_dir():
            scratch.mkdir()
            (scratch / _FILE).write_bytes(lines)
        raise


def _open(partial: Path, inputs: Mapping[str, str], *, force: bool) -> tuple[IO[bytes], list[Step]]:
    path = partial / _SCRATCH / _FILE
    if path.is_file():
        file = path.open("r+b", buffering=0)
        _lock(file, partial)
        try:
            theirs, steps, whole = _read(file)
            if differing := _differing(theirs, inputs):
                raise InputError(
                    f"holds unfinished work of other inputs; what differs: {differing}",
                    subject=str(partial),
                    fix="Give the same inputs to continue it, or --force to start again.",
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
            "another run is writing here", where=str(partial), fix="Wait for it, or stop it."
        ) from None


def _read(file: IO[bytes]) -> tuple[dict[str, str], list[Step], int]:
    """The inputs, the steps, and the offset at which the last whole line ends."""
    lines = file.read().split(b"\n")[:-1]  # what follows the last line's end was cut short
    whole = sum(len(line) + 1 for line in lines)
    try:
        first, *others = map(json.loads, lines)
        inputs = dict(first["inputs"])
    except (ValueError, LookupError, TypeError):
        return {"journal": "damaged"}, [], 0
    try:
        return inputs, [Step.from_json(value) for value in others], whole
    except (LookupError, TypeError):  # an older version of the program wrote other steps
        return {**inputs, "journal": "of another version"}, [], whole


def _differing(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    return ", ".join(names)
