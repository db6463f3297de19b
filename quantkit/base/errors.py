"""What can go wrong, said so that the reader can fix it, with an exit code for scripts."""

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

    ``where`` names the file, key or tensor, and stands before ``what`` with a colon; a ``subject``
    is the same, but begins the sentence that ``what`` goes on with: "--out is required".
    ``fix`` is a sentence that tells what to do. The command line prints all of it and exits with
    ``exit_code``; no traceback is shown.
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
    """A recipe, a checkpoint or an argument is not usable."""


class MachineError(QuantkitError):
    """The machine lacks something: an engine, disk space, memory, a device."""

    exit_code = ExitCode.MACHINE


def not_installed(package: str, extra: str) -> MachineError:
    """The error for an optional library that isn't there."""
    return MachineError(
        f"needs the package {package}, which isn't installed",
        fix=f"pip install 'quantkit[{extra}]'",
    )


def not_finite(tensor: str) -> InputError:
    """The error for a tensor that holds NaN or infinity."""
    return InputError(
        "holds NaN or infinity",
        subject=tensor,
        fix="The checkpoint is damaged, or its training diverged: repair it before quantizing.",
    )
