"""The commands: parse, call verbs, print. Heavy imports live inside the commands that need them."""

from __future__ import annotations

import gc
import signal

# Importing a module of commands adds them to the application, in the order of --help.
from quantkit.cli import making, judging, checking, suites, sharing, shelves  # isort: skip
from quantkit.cli.app import app  # isort: skip

_COLLECT_AFTER = 20_000  # objects; after Python's 700, a sixth of an import is spent on looking

__all__ = ["app", "checking", "judging", "main", "making", "sharing", "shelves", "suites"]


def main() -> None:
    """Run the command line. Being told to end is the same as Ctrl-C: clean up, then go."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    gc.set_threshold(_COLLECT_AFTER)
    try:
        app()
    finally:
        gc.freeze()  # or the interpreter looks for cycles among a million objects before it ends
