"""Expected failures, each with a message for the user and an exit code for scripts."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """Exit codes of the command line (documented in ``quantkit --help``)."""

    DONE = 0
    GATE_FAILED = 1
    BAD_INPUT = 2
    MACHINE = 3
    INCONCLUSIVE = 4
    BUG = 70
    INTERRUPTED = 130


class QuantkitError(Exception):
    """An expected failure: what is wrong, where, and how to fix it.

    what: a clause; where: the file, key or tensor that it is about, which the message puts before
    it with a colon; subject: the same for a ``what`` that begins with a verb, which makes one
    sentence of both ("--out is required"); fix: sentences that tell what to do. The command line
    prints all of them without a traceback, and exits with ``exit_code``.
    """

    exit_code = ExitCode.BAD_INPUT

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        subject: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.what = what
        self.where = where or subject
        self.fix = fix
        if subject:
            super().__init__(f"{subject} {what}")
        else:
            super().__init__(f"{where}: {what}" if where else what)


class InputError(QuantkitError):
    """A recipe, a checkpoint, another file or an argument can't be used."""


class MachineError(QuantkitError):
    """The machine lacks something: an engine, disk space, memory, a device."""

    exit_code = ExitCode.MACHINE


class CheckpointWarning(UserWarning):
    """Something in a model's directory is left out, or isn't what one would expect."""


def not_installed(package: str, extra: str) -> MachineError:
    """The error for an optional library that isn't installed. extra: of ours that brings it."""
    return MachineError(
        f"the package {package} is needed and isn't installed",
        fix=f"pip install 'quantkit[{extra}]'",
    )


def not_finite(tensor: str) -> InputError:
    """The error for a tensor that holds NaN or infinity."""
    return InputError(
        "holds NaN or infinity",
        subject=tensor,
        fix="The checkpoint is damaged, or its training diverged: repair it before quantizing it.",
    )
