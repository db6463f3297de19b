"""A command run to its end in a fresh process: its time, its memory, what it said last.

Only the standard library is used here and by what imports this: on Linux a new process may be
charged for the memory of the one that started it, so that one must be small.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

_EXCEPTION = re.compile(r"^(error:|[\w.]*(Error|Exception|Failure|Exit)\b)")
_FOLDERS = re.compile(r"(?<![\w:/.])(/[\w.@+-]+)+/(?=[\w.@+-])")  # of absolute paths, not of URLs
_MESSAGE_CHARACTERS = 300


@dataclass(frozen=True)
class Measured:
    """One process with those it started: seconds of wall and of CPU time, bytes.

    peak: resident bytes of the largest of them at its largest.
    error: what it said last when it failed, else None.
    """

    wall: float
    cpu: float
    peak: int
    error: str | None


def run(
    command: list[str], log: Path, *, timeout: float | None = None, settings: dict[str, str]
) -> Measured:
    """Run a command with ``settings`` added to the environment, all it says in ``log``.

    It runs in the log's folder: some tools leave files of their own where they run.
    After ``timeout`` seconds it is stopped, together with what it started.
    """
    stopped = threading.Event()
    with log.open("wb") as output:
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=log.parent,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | settings,
            start_new_session=True,
        )

        def stop() -> None:
            stopped.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(timeout, stop) if timeout else None
        if timer:
            timer.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            if timer:
                timer.cancel()
        wall = time.monotonic() - started
    process.returncode = code = os.waitstatus_to_exitcode(status)
    error = None
    if stopped.is_set():
        error = f"stopped after {timeout:.0f} s"
    elif code:
        error = last_message(log) or f"exit code {code}"
    return Measured(wall, usage.ru_utime + usage.ru_stime, peak_bytes(usage), error)


def peak_bytes(usage: resource.struct_rusage) -> int:
    """Linux counts in kibibytes, macOS in bytes."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def last_message(log: Path) -> str:
    """The last exception in a log, else its last line: on one line, shortened, without folders."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(encoding="utf-8", errors="replace"))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found = [number for number, line in enumerate(lines) if _EXCEPTION.match(line)]
    said = _FOLDERS.sub("…/", " ".join(lines[found[-1] :] if found else lines[-1:]))
    if len(said) > _MESSAGE_CHARACTERS:
        said = f"{said[:_MESSAGE_CHARACTERS]}…"
    return said
