"""How long work reports on itself. The floors below the command line know only this protocol."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One piece of long work with a known number of steps."""

    def advance(self, steps: int = 1, *, doing: str | None = None) -> None: ...


class Progress(Protocol):
    """Where tasks are announced; ``console.py`` shows them as bars or as plain lines."""

    def task(self, label: str, total: int) -> AbstractContextManager[Task]: ...

    def note(self, text: str) -> None: ...


class _Nothing:
    def advance(self, steps: int = 1, *, doing: str | None = None) -> None:
        pass


class Silent:
    """Progress that nobody watches: for library use and tests."""

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        yield _Nothing()

    def note(self, text: str) -> None:
        pass
