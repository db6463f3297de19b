"""A command run to its end in a fresh process: its time, its memory, its last message.

Only the standard library is used here, and by the benchmarks that measure memory: on Linux a new
process may be charged for the memory of the one that started it, so that one must be small.
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
    """One process together with those that it started.

    wall, cpu: seconds. peak: resident bytes of the largest process at its largest.
    error: the last message when the process failed, else None.
    """

    wall: float
    cpu: float
    peak: int
    error: str | None


def run(
    command: list[str], log: Path, *, timeout: float | None = None, settings: dict[str, str]
) -> Measured:
    """Run a command with ``settings`` added to the environment variables and its output in ``log``.

    After ``timeout`` seconds it is stopped, together with the processes that it started.
    """
    stopped = threading.Event()
    with log.open("wb") as output:
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=log.parent,  # some tools leave files of their own where they run
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | settings,
            start_new_session=True,  # a process group of its own, for stop()
        )

        def stop() -> None:
            stopped.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(timeout, stop) if timeout else None
        if timer:
            timer.start()
        try:
            # Not Popen.wait: wait4 alone gives the resources of this child and of its own.
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
    """The peak of resident memory in bytes."""
    # Linux counts in kibibytes, macOS in bytes.
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def last_message(log: Path) -> str:
    """The last exception in a log, or else its last line.

    It is put on one line, shortened, and the folders of paths are left out, because messages end up
    in tables that are published.
    """
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(encoding="utf-8", errors="replace"))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    exceptions = [number for number, line in enumerate(lines) if _EXCEPTION.match(line)]
    message = " ".join(lines[exceptions[-1] :] if exceptions else lines[-1:])
    message = _FOLDERS.sub("…/", message)
    if len(message) > _MESSAGE_CHARACTERS:
        message = f"{message[:_MESSAGE_CHARACTERS]}…"
    return message
