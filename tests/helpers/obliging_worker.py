"""A worker that does what its job says: answer, print, refuse, fail, exit or be killed."""

from __future__ import annotations

import os
import signal
from typing import Any

from quantkit.base.errors import InputError
from quantkit.engines.worker import serve


def work(job: dict[str, Any]) -> dict[str, Any]:
    match job["do"]:
        case "refuse":
            raise InputError("can't be done", fix="Ask for another thing.")
        case "fail":
            raise ZeroDivisionError("one by zero")
        case "exit":
            os._exit(0)
        case "be killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "print":
            print("a library's greeting")
            os.system("echo and a greeting from C")
    return {"given": job["value"], "variable": os.environ.get("A_VARIABLE")}


if __name__ == "__main__":
    serve(work)
