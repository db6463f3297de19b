"""The one place that prints: results to stdout, everything else to stderr.

Long work shows a progress bar on a terminal, and elsewhere a plain line every ten seconds.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from quantkit.base.errors import QuantkitError
from quantkit.base.files import json_text
from quantkit.base.progress import Task

_PLAIN_WIDTH = 160  # columns, where there is no terminal that has a width
_SECONDS_BETWEEN_LINES = 10.0


class Console:
    """The output of a command, and the progress of its work.

    as_json: stdout gets one JSON value, the result or the error, and nothing else.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self.out = RichConsole(width=None if sys.stdout.isatty() else _width(), highlight=False)
        self.err = RichConsole(
            stderr=True, width=None if sys.stderr.isatty() else _width(), highlight=False
        )
        _quiet_libraries()

    def show(self, value: Any, rendered: RenderableType | None = None) -> None:
        """Print a command's result: ``value`` with --json, else ``rendered``."""
        if self.as_json:
            sys.stdout.write(_json_for(value, sys.stdout.encoding))
        elif rendered is not None:
            self.out.print(rendered, soft_wrap=isinstance(rendered, str))

    def note(self, text: str) -> None:
        """Print a line for people, while work is under way or after it."""
        self.err.print(escape(text), soft_wrap=True)

    def error(self, error: QuantkitError) -> None:
        """Print what went wrong, where, and how to fix it."""
        self.err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        if error.fix:
            self.err.print(f"       {escape(error.fix)}", soft_wrap=True)
        if self.as_json:
            fields = {"what": error.what, "where": error.where, "fix": error.fix}
            self.show({"error": fields, "exit_code": int(error.exit_code)})

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        """Show the progress of long work of ``total`` steps."""
        if self.err.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(elapsed_when_finished=True),
                TextColumn("[dim]{task.fields[doing]}"),
            )
            with RichProgress(*columns, console=self.err) as bars:
                yield _Bar(bars, label, total)
        else:
            lines = _Lines(self.err, label, total)
            yield lines
            lines.finish()


class _Bar:
    def __init__(self, bars: RichProgress, label: str, total: int) -> None:
        self._bars = bars
        self._id = bars.add_task(escape(label), total=total, doing="")

    def advance(self, steps: int = 1, *, doing: str | None = None) -> None:
        if doing is not None:
            self._bars.update(self._id, doing=escape(doing))
        self._bars.advance(self._id, steps)


class _Lines:
    def __init__(self, console: RichConsole, label: str, total: int) -> None:
        self._console, self._label, self._total = console, label, total
        self._done = 0
        self._started = self._printed = time.monotonic()

    def advance(self, steps: int = 1, *, doing: str | None = None) -> None:
        self._done += steps
        now = time.monotonic()
        if now - self._printed < _SECONDS_BETWEEN_LINES or not self._done:
            return
        self._printed = now
        left = (now - self._started) / self._done * max(self._total - self._done, 0)
        what = f", {doing}" if doing else ""
        share = 100 * self._done // max(self._total, 1)
        self._print(f"{self._label}: {share}%{what}, about {left:.0f} s left")

    def finish(self) -> None:
        self._print(f"{self._label}: done in {time.monotonic() - self._started:.1f} s")

    def _print(self, text: str) -> None:
        self._console.print(escape(text), soft_wrap=True)


def _json_for(value: Any, encoding: str | None) -> str:
    """JSON that a stream of this encoding can hold; what it can't is escaped, as JSON allows."""
    text = json_text(value)
    try:
        text.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        return json_text(value, ascii_only=True)
    return text


def _width() -> int:
    return int(os.environ.get("COLUMNS", _PLAIN_WIDTH))


def _quiet_libraries() -> None:
    """Silence the hints that libraries log about themselves; what matters we print ourselves."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("bitsandbytes", "gguf", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
