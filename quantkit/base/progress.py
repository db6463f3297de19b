"""How long work reports its progress: the one protocol that all packages below cli know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One piece of long work with a known number of steps."""

    def advance(self, steps: int = 1, *, doing: str | None = None) -> None:
        """Count finished steps. doing: what was worked on, such as a tensor's name."""


class Progress(Protocol):
    """Where work is reported; the console shows tasks as bars, or as plain lines."""

    def task(self, label: str, total: int) -> AbstractContextManager[Task]:
        """A task of ``total`` steps, which ends with the context."""
        ...

    def note(self, text: str) -> None:
        """Report one thing that the user should know."""


class _Nothing:
    def advance(self, steps: int = 1, *, doing: str | None = None) -> None:
        pass


class Silent:
    """Progress that is shown nowhere: for tests and for use as a library."""

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        yield _Nothing()

    def note(self, text: str) -> None:
        pass
