"""Work in a fresh process: a job goes in as JSON on stdin, its answer comes out as JSON on stdout.

An engine that aborts takes only its worker with it, and nothing of the caller's memory or caches
is in the figures that a worker measures. A module that is run as a worker calls ``serve``; who
needs the work done calls ``ask``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from quantkit.base.errors import InputError, MachineError, QuantkitError

# The whole model is here; a worker looks for nothing on the network.
_ENVIRONMENT = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}


class WorkerDied(MachineError):
    """A worker's process ended without an answer."""


class WorkerKilled(MachineError):
    """The system killed a worker's process."""


def ask(
    module: str, job: Mapping[str, Any], where: str, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run ``python -m MODULE`` on a job and return its answer.

    where: what the job is about, for errors; environment: variables beside this process's own.
    Raises InputError for what the worker refused, WorkerKilled where the system killed it, and
    WorkerDied where it ended in another way.
    """
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(job),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, **_ENVIRONMENT, **(environment or {})},
        check=False,
    )
    if done.returncode == -signal.SIGKILL:
        raise WorkerKilled(
            "its process was killed, perhaps for want of memory",
            where=where,
            fix="Use a machine with more memory.",
        )
    if done.returncode != 0 or not done.stdout:
        lines = done.stderr.strip().splitlines() or ["it printed nothing"]
        raise WorkerDied(f"its process ended with code {done.returncode}: {lines[-1]}", where=where)
    answer: dict[str, Any] = json.loads(done.stdout)
    if "error" in answer:
        raise InputError(answer["error"], where=where)
    return answer


def serve(work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer the job on stdin, where this process is the worker.

    An expected error is answered by its message; any other ends the process with a traceback.
    """
    # Libraries print to stdout, some from C. From here on that goes to stderr, so that the answer
    # is all that the caller gets.
    stdout = os.dup(1)
    os.dup2(2, 1)
    job = json.loads(sys.stdin.read())
    try:
        answer = work(job)
    except QuantkitError as error:
        answer = {"error": str(error)}
    with os.fdopen(stdout, "w") as file:
        file.write(json.dumps(answer))
