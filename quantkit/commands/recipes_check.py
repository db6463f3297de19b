"""recipes check: recipes and suites compared with their lock: a published version never changes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.base import resources
from quantkit.base.errors import InputError
from quantkit.recipes.lock import LOCK_FILE, Entry, LockProblem, check_lock, write_lock


@dataclass(frozen=True)
class RecipesReport:
    """What a check came to. lines: of the lock, new ones included; new: entries not locked before.

    Entries that aren't locked are problems too, unless they were written.
    """

    folder: Path
    lock: Path
    lines: int
    new: tuple[Entry, ...]
    problems: tuple[LockProblem, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "lock": str(self.lock),
            "problems": [
                {"document": problem.where, "problem": problem.what, "fix": problem.fix}
                for problem in self.problems
            ],
            "new": [" ".join(entry) for entry in self.new],
        }


def check_recipes(folder: Path | None, lock: Path | None, *, write: bool) -> RecipesReport:
    """Compare a folder of recipes (the shipped ones if None) with its lock.

    lock: FOLDER/recipes.lock if None; write: add new entries to it, unless there is a problem.

    Raises InputError, see ``check_lock``.
    """
    folder = folder or resources.recipes()
    if not folder.is_dir():
        raise InputError("isn't a folder", subject=str(folder))
    lock = lock or folder / LOCK_FILE
    report = check_lock(folder, lock)
    problems = list(report.problems)
    if not write:
        fix = "Run quantkit recipes check --write."
        problems += [LockProblem(entry, "isn't locked", fix) for entry in report.new]
    elif report.new and not problems:
        write_lock(lock, report)
    return RecipesReport(
        folder=folder,
        lock=lock,
        lines=len(report.locked) + len(report.new),
        new=tuple(report.new),
        problems=tuple(problems),
    )
