"""Text that a model was calibrated on can't judge it: word 13-grams that two texts share.

Thirteen words are what GPT-3's authors took for contamination (arXiv 2005.14165, appendix C).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.artifact.manifest import read_manifest
from quantkit.base import resources
from quantkit.base.errors import InputError, QuantkitError
from quantkit.base.files import read_optional_json
from quantkit.documents.dataset import Dataset, Document, HubDataset, digest_of, read
from quantkit.judging.regression import Case
from quantkit.results.manifest import RUN

WORDS = 13
_FEWEST = 5  # words of a document that is worth comparing
_SHOWN = 5
_CJK = "\u3040-\u30ff\u3400-\u9fff"  # written without spaces: each character is a word
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")
_TAG = re.compile(r"<\|[^|>]*\|>|</?[a-z_]+>")  # of chat templates: no words of the text


@dataclass(frozen=True)
class Overlap:
    """A document of a suite that shares words with calibration text, and where they are there."""

    where: str
    calibration: str
    shared: int
    words: str

    def __str__(self) -> str:
        runs = "a run" if self.shared == 1 else f"{self.shared} runs"
        return f'{self.where} shares {runs} of words with {self.calibration}: "{self.words}"'


def find_overlaps(judged: Sequence[Document], calibration: Iterable[Document]) -> list[Overlap]:
    """The documents of ``judged`` that share a run of 13 words with calibration text.

    Shorter ones overlap when they are the same. Case, punctuation and template tags don't count;
    runs don't cross documents.
    """
    owners: dict[tuple[str, ...], list[int]] = {}
    for index, document in enumerate(judged):
        for gram in set(_grams(document)):
            owners.setdefault(gram, []).append(index)
    found: dict[int, tuple[str, set[tuple[str, ...]]]] = {}
    for document in calibration:
        for gram in _grams(document):
            for index in owners.get(gram, ()):
                found.setdefault(index, (document.where, set()))[1].add(gram)
    return [
        Overlap(judged[index].where, where, len(grams), " ".join(min(grams)))
        for index, (where, grams) in sorted(found.items())
    ]


def _grams(document: Document) -> Iterator[tuple[str, ...]]:
    words = _WORD.findall(_TAG.sub(" ", document.words).lower())
    if _FEWEST <= len(words) < WORDS:  # too short for a run: the whole of it
        return iter([tuple(words)])
    return zip(*(words[start:] for start in range(WORDS)), strict=False)


def of_cases(cases: Sequence[Case], path: Path) -> list[Document]:
    """The prompts of cases, as documents."""
    return [Document(f"{path}: {c.id}", c.messages or c.prompt or "") for c in cases]


def calibration_of(artifact: Path) -> Dataset | str | None:
    """The text that an artifact was calibrated on; None if on none, why where it can't be found.

    The manifest has its name and digest, and run.json the path of the recipe that named it.
    """
    manifest = read_manifest(artifact)
    if manifest is None:
        return "has no manifest that says what it was calibrated on"
    known: dict[str, Any] | None = manifest.get("calibration")
    if known is None:
        return None
    named = manifest["recipe"]["content"]["calibration"]["dataset"]
    run = read_optional_json(artifact / RUN)
    directory = Path(run.get("recipe", "recipe.yaml")).parent
    candidates: list[Dataset]
    if isinstance(named, dict):
        candidates = [HubDataset(**named).relative_to(directory)]
    else:
        paths = [directory / named, resources.calibration() / Path(named).name]
        candidates = [path.resolve() for path in paths if path.is_file()]
    for candidate in candidates:
        try:
            if digest_of(candidate) == known["dataset_sha256"]:
                return candidate
        except QuantkitError:
            continue
    name = named["hub"] if isinstance(named, dict) else Path(named).name
    return f"was calibrated on {name}, which isn't at hand as it was"


def check_overlap(
    artifacts: Sequence[Path], judged: Sequence[Document], *, allow: bool
) -> list[str]:
    """What to say of artifacts that may have seen the suite's text.

    Raises InputError where one did, unless ``allow``.
    """
    said: list[str] = []
    seen: dict[str, list[Overlap]] = {}
    for artifact in artifacts:
        dataset = calibration_of(artifact)
        if isinstance(dataset, str):
            said.append(f"{artifact.name} {dataset}: overlap with the suite isn't checked.")
        elif dataset is not None:
            key = str(dataset)
            if key not in seen:
                seen[key] = find_overlaps(judged, read(dataset)[0])
            if found := seen[key]:
                said.append(_report(artifact, found, len(judged), allow))
    return said


def _report(artifact: Path, found: Sequence[Overlap], total: int, allow: bool) -> str:
    what = f"{len(found)} of the suite's {total} texts overlap with its calibration text"
    if allow:
        return f"{artifact.name}: {what}; its figures may flatter it."
    raise InputError(
        f"{what}\n{listed(found)}",
        where=str(artifact),
        fix="Judge it on text that it hasn't seen, or pass --allow-overlap to judge it all the "
        "same and say so in the result.",
    )


def listed(found: Sequence[Overlap]) -> str:
    """The first overlaps, one a line."""
    lines = [str(overlap) for overlap in found[:_SHOWN]]
    more = len(found) - _SHOWN
    return "\n".join(lines + ([f"and {more} more"] if more > 0 else []))
