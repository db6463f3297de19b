"""Overlap of a suite's text with the text that an artifact was calibrated on.

Two documents overlap when they share a run of 13 words, which is what GPT-3's authors counted as
contamination (arXiv 2005.14165, appendix C).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantkit.artifact.manifest import read_manifest, read_run
from quantkit.base import resources
from quantkit.base.errors import InputError, QuantkitError
from quantkit.documents.dataset import Dataset, Document, digest_of, read_dataset
from quantkit.documents.hub import HubDataset
from quantkit.judging.cases import Case
from quantkit.results.manifest import MergedManifest

WORDS = 13
_FEWEST = 5  # words that a document must have: shorter ones, such as "yes", are in any text
_SHOWN = 5
_CJK = "\u3040-\u30ff\u3400-\u9fff"  # written without spaces: each character is a word
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")
_TAG = re.compile(r"<\|[^|>]*\|>|</?[a-z_]+>")  # of chat templates, which aren't the text's words


@dataclass(frozen=True)
class Overlap:
    """A document of a suite that shares runs of words with calibration text.

    where: the suite's document; calibration: the first document that shares a run with it;
    shared: how many runs; words: one of them.
    """

    where: str
    calibration: str
    shared: int
    words: str

    def __str__(self) -> str:
        runs = "a run" if self.shared == 1 else f"{self.shared} runs"
        return f'{self.where} shares {runs} of words with {self.calibration}: "{self.words}"'


def find_overlaps(judged: Sequence[Document], calibration: Iterable[Document]) -> list[Overlap]:
    """The documents of ``judged`` that share a run of 13 words with a document of ``calibration``.

    A document of 5 to 12 words overlaps where a calibration document has just the same words.
    Case, punctuation and the tags of chat templates are ignored.
    """
    owners: dict[tuple[str, ...], list[int]] = {}
    for index, document in enumerate(judged):
        for gram in set(_grams(document)):
            owners.setdefault(gram, []).append(index)
    shared: dict[int, tuple[str, set[tuple[str, ...]]]] = {}
    for document in calibration:
        for gram in _grams(document):
            for index in owners.get(gram, ()):
                shared.setdefault(index, (document.where, set()))[1].add(gram)
    return [
        Overlap(judged[index].where, where, len(grams), " ".join(min(grams)))
        for index, (where, grams) in sorted(shared.items())
    ]


def _grams(document: Document) -> Iterator[tuple[str, ...]]:
    """The runs of 13 words; all words of a shorter document."""
    words = _WORD.findall(_TAG.sub(" ", document.words).lower())
    if _FEWEST <= len(words) < WORDS:
        return iter([tuple(words)])
    return zip(*(words[start:] for start in range(WORDS)), strict=False)


def case_documents(cases: Sequence[Case], path: Path) -> list[Document]:
    """The prompts of cases as documents; ``path`` is the file that they are from."""
    return [Document(f"{path}: {c.id}", c.messages or c.prompt or "") for c in cases]


def calibration_of(artifact: Path) -> Dataset | str | None:
    """The text that an artifact was calibrated on; None where it was calibrated on none.

    Where the text is unknown or can't be found, a str has the reason, without the artifact as its
    subject. The manifest has the text's name and digest, run.json the path of the recipe that
    names it.
    """
    manifest = read_manifest(artifact)
    if manifest is None:
        return "has no manifest that names its calibration text"
    if isinstance(manifest, MergedManifest) or manifest.calibration is None:
        return None
    named = manifest.recipe.content["calibration"]["dataset"]
    run = read_run(artifact)
    directory = Path(run.recipe if run and run.recipe else "recipe.yaml").parent
    candidates: list[Dataset]
    if isinstance(named, dict):
        candidates = [HubDataset(**named).relative_to(directory)]
    else:
        paths = [directory / named, resources.calibration() / Path(named).name]
        candidates = [path.resolve() for path in paths if path.is_file()]
    for candidate in candidates:
        try:
            if digest_of(candidate) == manifest.calibration.dataset_sha256:
                return candidate
        except QuantkitError:
            continue
    name = named["hub"] if isinstance(named, dict) else Path(named).name
    return f"was calibrated on {name}, which is missing or has changed since"


def check_overlap(
    artifacts: Mapping[str, Path], judged: Sequence[Document], *, allow: bool
) -> list[str]:
    """Remarks on artifacts that were, or may have been, calibrated on the suite's text.

    artifacts: by their names; judged: all documents of the suite. Raises InputError for the first
    artifact whose calibration text overlaps with them, unless ``allow``.
    """
    remarks: list[str] = []
    known: dict[str, list[Overlap]] = {}  # by dataset, which many artifacts may share
    for name, artifact in artifacts.items():
        dataset = calibration_of(artifact)
        if isinstance(dataset, str):
            remarks.append(f"{name} {dataset}: overlap with the suite wasn't checked.")
        elif dataset is not None:
            key = str(dataset)
            if key not in known:
                known[key] = find_overlaps(judged, read_dataset(dataset).documents)
            if overlaps := known[key]:
                remarks.append(_remark(artifact, name, overlaps, len(judged), allow))
    return remarks


def _remark(artifact: Path, name: str, overlaps: Sequence[Overlap], total: int, allow: bool) -> str:
    what = f"{len(overlaps)} of the suite's {total} texts overlap with its calibration text"
    if allow:
        return f"{name}: {what}; its figures may flatter it."
    raise InputError(
        f"{what}\n{overlap_list(overlaps)}",
        where=str(artifact),
        fix="Judge it on text that it hasn't seen, or pass --allow-overlap to judge it all the "
        "same with a remark in the result.",
    )


def overlap_list(overlaps: Sequence[Overlap]) -> str:
    """The first five overlaps, one a line, and how many more there are."""
    lines = [str(overlap) for overlap in overlaps[:_SHOWN]]
    more = len(overlaps) - _SHOWN
    return "\n".join(lines + ([f"and {more} more"] if more > 0 else []))
