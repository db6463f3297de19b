"""suite check: every mistake in a suite, found without running a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.base.errors import InputError, MachineError, QuantkitError
from quantkit.documents.dataset import Document, read_dataset
from quantkit.judging.cases import load_cases
from quantkit.judging.gates import check_slices
from quantkit.judging.harness import Harness
from quantkit.judging.overlap import case_documents, find_overlaps, overlap_list
from quantkit.recipes.recipe import LoadedRecipe
from quantkit.recipes.suite import LoadedSuite


@dataclass(frozen=True)
class SuiteReport:
    """problems: what must be fixed; notes: what the suite holds, and what couldn't be checked."""

    problems: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"problems": list(self.problems), "notes": list(self.notes)}


def check_suite(
    loaded: LoadedSuite, recipes: Sequence[LoadedRecipe], *, allow_code: bool
) -> SuiteReport:
    """Read all files that a suite names, and look for the recipes' calibration text in them.

    allow_code: import Python that the suite brings. What this machine can't check, such as a data
    set of the Hub without a network, is a note and no problem.
    """
    problems: list[str] = []
    notes: list[str] = []
    texts: list[Document] = []
    parts = (_gates, _likelihood, _cases, _harness)
    for part in parts:
        try:
            note, documents = part(loaded, allow_code)
            texts += documents
            notes += [note] if note else []
        except MachineError as error:
            notes.append(f"not checked: {_sentence(error)}")
        except QuantkitError as error:
            problems.append(_sentence(error))
    for recipe in recipes:
        try:
            notes.append(_overlap(recipe, texts))
        except MachineError as error:
            notes.append(f"not checked: {recipe.recipe.name}: {_sentence(error)}")
        except QuantkitError as error:
            problems.append(_sentence(error))
    return SuiteReport(tuple(problems), tuple(notes))


Part = tuple[str, list[Document]]  # a note on a part of the suite, and the text in it


def _gates(loaded: LoadedSuite, allow_code: bool) -> Part:
    gates = loaded.suite.gates
    return f"gates: {len(gates)}" if gates else "no gates, so there is no verdict", []


def _likelihood(loaded: LoadedSuite, allow_code: bool) -> Part:
    texts = read_dataset(loaded.likelihood_dataset())
    words = sum(len(document.words.split()) for document in texts.documents)
    note = f"likelihood: {texts.found}; {words:,} words, {texts.digest[:12]}"
    return note, texts.documents


def _cases(loaded: LoadedSuite, allow_code: bool) -> Part:
    if loaded.suite.regression is None:
        return "no regression cases", []
    path = loaded.resolve(loaded.suite.regression.cases)
    cases = load_cases(path, allow_code=allow_code)
    check_slices(loaded.suite, cases)
    checks = Counter(name for case in cases for check in case.check for name in check.names)
    kinds = ", ".join(f"{count} {name}" for name, count in checks.most_common())
    critical = sum(case.critical for case in cases)
    note = f"regression: {len(cases)} cases, {critical} of them critical; checks: {kinds}"
    return note, case_documents(cases, path)


def _harness(loaded: LoadedSuite, allow_code: bool) -> Part:
    tasks = loaded.harness_tasks()
    if tasks is None:
        return "", []
    harness = Harness(tasks, allow_code=allow_code)
    harness.check_metrics([gate.metric for gate in loaded.suite.gates])
    return f"harness: {', '.join(tasks.names)}", []


def _overlap(loaded: LoadedRecipe, texts: Sequence[Document]) -> str:
    name, dataset = loaded.recipe.name, loaded.calibration_dataset()
    if dataset is None:
        return f"{name}: has no calibration text"
    overlaps = find_overlaps(texts, read_dataset(dataset).documents)
    if overlaps:
        raise InputError(
            f"{len(overlaps)} of the suite's {len(texts)} texts overlap with {dataset}\n"
            f"{overlap_list(overlaps)}",
            where=name,
        )
    return f"{name}: no overlap with {dataset}"


def _sentence(error: QuantkitError) -> str:
    fix = f" {error.fix}" if error.fix else ""
    return f"{error}.{fix}" if fix and not str(error).endswith(".") else f"{error}{fix}"
