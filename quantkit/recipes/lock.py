"""The lock of a folder of recipes and suites: what each published version was.

``recipes.lock`` is text, one line a thing, made by ``quantkit recipes check --write``:

    recipe NAME VERSION DIGEST
    suite NAME VERSION DIGEST
    file PATH SHA256

The digest is the document's own (of its content, not its layout). The files are the calibration
texts, held-out texts and cases that documents name; paths are relative to the lock's folder. Lines
of earlier versions stay, so that no version number is ever used for two things.
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

LOCK = "recipes.lock"
_HEADER = "# Written by `quantkit recipes check --write`. A line that stands here never changes.\n"
_FIELDS = {"recipe": 4, "suite": 4, "file": 3}

Entry = tuple[str, ...]  # a line without its digest: (kind, name, version) or ("file", path)


@dataclass(frozen=True)
class Problem:
    """Something that the lock doesn't allow: what, where, and how to fix it."""

    entry: Entry
    what: str
    fix: str

    @property
    def where(self) -> str:
        return " ".join(self.entry)


@dataclass(frozen=True)
class Check:
    """What a folder holds beside its lock. ``new``: not locked yet, and free to be."""

    locked: dict[Entry, str]
    new: dict[Entry, str]
    problems: tuple[Problem, ...]


def check(folder: Path, lock: Path) -> Check:
    """Compare the recipes of ``folder`` and the suites of it and its ``suites`` with the lock.

    A lock that doesn't exist locks nothing. Raises InputError for a document that isn't valid, a
    file that one names and isn't there, two documents of one name, and an unreadable lock.
    """
    locked = read(lock) if lock.is_file() else {}
    found = dict(_found(folder, lock.parent, locked))
    problems = [
        _changed(entry) for entry, digest in found.items() if locked.get(entry, digest) != digest
    ]
    current = {entry[:2] for entry in found}
    missing = {entry[:2]: entry for entry in locked if entry[:2] not in current}
    problems += [_missing(entry) for entry in missing.values()]
    new = {entry: digest for entry, digest in found.items() if entry not in locked}
    return Check(locked, new, tuple(problems))


def read(lock: Path) -> dict[Entry, str]:
    """The lines of a lock. Raises InputError for one that can't be read."""
    entries: dict[Entry, str] = {}
    for number, line in enumerate(lock.read_text(encoding="utf-8").splitlines(), 1):
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


def write(lock: Path, result: Check) -> None:
    """Lock what is new. What was locked stays as it was."""
    entries = {**result.locked, **result.new}
    lines = [" ".join((*entry, entries[entry])) for entry in sorted(entries, key=_order)]
    write_whole(lock, _HEADER + "\n".join(lines) + "\n")


def _order(entry: Entry) -> tuple[object, ...]:
    numbers = tuple(int(part) if part.isdigit() else 0 for part in entry[-1].split("."))
    return (list(_FIELDS).index(entry[0]), entry[1], numbers)


def _found(folder: Path, root: Path, locked: Iterable[Entry]) -> Iterator[tuple[Entry, str]]:
    """Every document with its digest, and every file that one names or has named."""
    paths = sorted([*folder.glob("*.yaml"), *folder.glob("suites/*.yaml")])
    if not paths:
        raise InputError(
            "holds no recipe", subject=str(folder), fix="Recipes and suites are *.yaml files."
        )
    names: dict[tuple[str, str], Path] = {}
    once = {(root / entry[1]).resolve() for entry in locked if entry[0] == "file"}
    files = {file for file in once if file.is_file()}
    for path in paths:
        kind, document, named = _open(path)
        other = names.setdefault((kind, document.name), path)
        if other != path:
            raise InputError(f"has the name of {other}: {document.name}", subject=str(path))
        yield (kind, document.name, document.version), document.digest
        files |= named
    for file in sorted(files):
        if not file.is_file():
            raise InputError("is named by a document here, and isn't there", subject=str(file))
        yield ("file", Path(os.path.relpath(file, root.resolve())).as_posix()), sha256(file)


def _open(path: Path) -> tuple[str, Versioned, set[Path]]:
    if "likelihood" in read_yaml(path):
        loaded = load_suite(str(path))
        suite, files = loaded.suite, _file(loaded.likelihood_dataset())
        if suite.regression is not None:
            files.add(loaded.resolve(suite.regression.cases))
        if suite.harness is not None and suite.harness.include_path is not None:
            folder = loaded.resolve(suite.harness.include_path)
            files |= {p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
        return "suite", suite, files
    recipe = load_recipe(str(path))
    return "recipe", recipe.recipe, _file(recipe.calibration_dataset())


def _file(dataset: Dataset | None) -> set[Path]:
    """A data set's file; one of the Hub is pinned by its revision."""
    return {dataset} if isinstance(dataset, Path) else set()


def _changed(entry: Entry) -> Problem:
    if entry[0] == "file":
        return Problem(
            entry, "has changed since it was published", "Undo it, and give new text a new file."
        )
    return Problem(
        entry,
        "has changed, and its version hasn't",
        "Undo the edit, or raise the version and run quantkit recipes check --write.",
    )


def _missing(entry: Entry) -> Problem:
    return Problem(
        entry,
        "was published, and isn't there",
        "Restore it; if it was never released, delete its lines from the lock.",
    )
