"""The commands: parse, call verbs, print. Heavy imports live inside the commands that need them."""

from __future__ import annotations

import gc
import signal

# Importing a module of commands adds them to the application, in the order of --help.
from quantkit.cli import making, judging, checking, suites, sharing, shelves  # isort: skip
from quantkit.cli.app import app  # isort: skip

__all__ = ["app", "checking", "judging", "main", "making", "sharing", "shelves", "suites"]


def main() -> None:
    """Run the command line. Being told to end is the same as Ctrl-C: clean up, then go."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    finally:
        gc.freeze()  # or the interpreter looks for cycles among a million objects before it ends
