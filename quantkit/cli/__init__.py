"""The command line: parse, call the Python API, print, and leave with an exit code."""

from __future__ import annotations

import gc
import io
import signal
import sys
from importlib import import_module

from quantkit.cli.app import app

# A command is the file of its name. Importing it adds it to the application, in this order, which
# is the order of --help. Each imports what it needs when it runs, so that --help answers at once.
COMMANDS = (
    "quantize",
    "sweep",
    "merge",
    "eval",
    "bench",
    "compare",
    "report",
    "inspect",
    "verify",
    "export",
    "recipes_list",
    "recipes_show",
    "recipes_check",
    "suite_init",
    "suite_check",
    "cache_list",
    "cache_clear",
)
for _name in COMMANDS:
    import_module(f"quantkit.cli.{_name}")

# Objects made before Python looks for cycles among them. Its own 700 cost a sixth of the time that
# imports take, and find nothing.
_COLLECT_AFTER = 20_000

__all__ = ["COMMANDS", "app", "main"]


def main() -> None:
    """Run the command line."""
    # A request to end is handled as Ctrl-C is: clean up, then leave.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        # A terminal in ASCII can't show every character, nor can UTF-8 every file's name.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    gc.set_threshold(_COLLECT_AFTER)
    try:
        app()
    finally:
        # Without this the interpreter looks for cycles among a million objects before it ends.
        gc.freeze()
