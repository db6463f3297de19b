"""The lock of a folder of recipes and suites: the digest of every version ever published.

``recipes.lock`` is text with one entry a line, written by ``quantkit recipes check --write``:

    recipe NAME VERSION DIGEST
    suite NAME VERSION DIGEST
    file PATH SHA256

A recipe's or suite's digest is taken of its content, not of its layout. The files are the
calibration texts, held-out texts and cases that recipes and suites name; their paths are relative
to the lock's folder. Lines of earlier versions stay, so that a version number never names two
different recipes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from quantkit.base.errors import InputError
from quantkit.base.files import sha256, write_whole
from quantkit.documents.dataset import Dataset
from quantkit.documents.document import Versioned, read_yaml
from quantkit.recipes.recipe import load_recipe
from quantkit.recipes.suite import load_suite

LOCK_FILE = "recipes.lock"
_HEADER = "# Written by `quantkit recipes check --write`. A line that stands here never changes.\n"
_FIELDS = {"recipe": 4, "suite": 4, "file": 3}

Entry = tuple[str, ...]  # a line without its digest: (kind, name, version) or ("file", path)


@dataclass(frozen=True)
class LockProblem:
    """An entry that the lock doesn't allow, the reason, and what to do about it."""

    entry: Entry
    what: str
    fix: str

    @property
    def where(self) -> str:
        return " ".join(self.entry)


@dataclass(frozen=True)
class LockReport:
    """A folder compared with its lock. locked, new: digests by entry; new: not in the lock yet."""

    locked: dict[Entry, str]
    new: dict[Entry, str]
    problems: tuple[LockProblem, ...]


def check_lock(folder: Path, lock: Path) -> LockReport:
    """Compare the recipes of ``folder``, and the suites in it and in its ``suites``, with a lock.

    A lock file that doesn't exist is an empty lock. Raises InputError for an invalid recipe or
    suite, a file that one of them names and that doesn't exist, two of one name, and an unreadable
    lock.
    """
    locked = read_lock(lock) if lock.is_file() else {}
    current = dict(_current_entries(folder, lock.parent, locked))
    problems = [
        _changed(entry) for entry, digest in current.items() if locked.get(entry, digest) != digest
    ]
    # Of a recipe or a suite one version at a time is in the folder, so that names are compared.
    present = {entry[:2] for entry in current}
    missing = {entry[:2]: entry for entry in locked if entry[:2] not in present}
    problems += [_missing(entry) for entry in missing.values()]
    new = {entry: digest for entry, digest in current.items() if entry not in locked}
    return LockReport(locked, new, tuple(problems))


def read_lock(lock: Path) -> dict[Entry, str]:
    """The digests of a lock file by entry. Raises InputError for a line that isn't an entry."""
    entries: dict[Entry, str] = {}
    for number, line in enumerate(_lines(lock), 1):
        fields = line.split()
        if not fields or fields[0].startswith("#"):
            continue
        *entry, digest = fields
        if _FIELDS.get(fields[0]) != len(fields) or len(digest) != 64:
            raise InputError(
                f"isn't a line of a lock: {line.strip()!r}",
                subject=f"{lock}:{number}",
                fix="Lines are: recipe|suite NAME VERSION DIGEST, or file PATH SHA256.",
            )
        if tuple(entry) in entries:
            raise InputError(f"{' '.join(entry)} is locked twice", where=f"{lock}:{number}")
        entries[tuple(entry)] = digest
    return entries


def _lines(lock: Path) -> list[str]:
    return lock.read_text(encoding="utf-8", errors="surrogateescape").splitlines()


def write_lock(lock: Path, report: LockReport) -> None:
    """Add the new entries to the lock file; those that are locked stay."""
    entries = {**report.locked, **report.new}
    lines = [" ".join((*entry, entries[entry])) for entry in sorted(entries, key=_order)]
    write_whole(lock, _HEADER + "\n".join(lines) + "\n")


def _order(entry: Entry) -> tuple[object, ...]:
    """By kind, name and version; versions by number, so that 1.10.0 comes after 1.9.0."""
    numbers = tuple(int(part) if part.isdigit() else 0 for part in entry[-1].split("."))
    return (list(_FIELDS).index(entry[0]), entry[1], numbers)


def _current_entries(
    folder: Path, root: Path, locked: Iterable[Entry]
) -> Iterator[tuple[Entry, str]]:
    """Every recipe, suite and file that they name, with its digest.

    Files that an earlier version named are among them: that version still needs its text.
    """
    paths = sorted([*folder.glob("*.yaml"), *folder.glob("suites/*.yaml")])
    if not paths:
        raise InputError(
            "holds no recipe", subject=str(folder), fix="Recipes and suites are *.yaml files."
        )
    names: dict[tuple[str, str], Path] = {}
    published = {(root / entry[1]).resolve() for entry in locked if entry[0] == "file"}
    # A published file that is gone is reported as a problem, by check_lock.
    files = {file for file in published if file.is_file()}
    for path in paths:
        kind, document, named = _open_document(path)
        other = names.setdefault((kind, document.name), path)
        if other != path:
            raise InputError(f"has the name of {other}: {document.name}", subject=str(path))
        yield (kind, document.name, document.version), document.digest
        files |= named
    for file in sorted(files):
        if not file.is_file():
            raise InputError("is named by a recipe or suite and doesn't exist", subject=str(file))
        yield ("file", Path(os.path.relpath(file, root.resolve())).as_posix()), sha256(file)


def _open_document(path: Path) -> tuple[str, Versioned, set[Path]]:
    """The kind of a YAML file, its recipe or suite, and the files that it names."""
    if "likelihood" in read_yaml(path):
        loaded = load_suite(str(path))
        suite, files = loaded.suite, _local_file(loaded.likelihood_dataset())
        if suite.regression is not None:
            files.add(loaded.resolve(suite.regression.cases))
        if suite.harness is not None and suite.harness.include_path is not None:
            folder = loaded.resolve(suite.harness.include_path)
            files |= {p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
        return "suite", suite, files
    recipe = load_recipe(str(path))
    return "recipe", recipe.recipe, _local_file(recipe.calibration_dataset())


def _local_file(dataset: Dataset | None) -> set[Path]:
    """A data set's file; none for one of the Hub, which its revision pins."""
    return {dataset} if isinstance(dataset, Path) else set()


def _changed(entry: Entry) -> LockProblem:
    if entry[0] == "file":
        return LockProblem(
            entry,
            "has changed since it was published",
            "Undo the edit, and give new text a new file.",
        )
    return LockProblem(
        entry,
        "has changed, and its version hasn't",
        "Undo the edit, or raise the version and run quantkit recipes check --write.",
    )


def _missing(entry: Entry) -> LockProblem:
    return LockProblem(
        entry,
        "was published and doesn't exist any more",
        "Restore it; if it was never released, delete its lines from the lock.",
    )
