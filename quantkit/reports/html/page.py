"""The comparison as one HTML page, without scripts or anything to load.

The template escapes all text, and the page's Content-Security-Policy forbids loading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from quantkit.checkpoint.source import model_name
from quantkit.reports import tradeoff
from quantkit.reports.cells import failures, gate_sentence, missing, table
from quantkit.reports.changes import Piece, changes
from quantkit.reports.details import Detail, experts_table, slice_table
from quantkit.reports.html import figures
from quantkit.reports.html.figures import Panel
from quantkit.reports.losses import HEADERS, rows, summary
from quantkit.reports.text import writable
from quantkit.results.comparison import Comparison, Variant
from quantkit.results.manifest import QuantizedManifest
from quantkit.results.regression import CaseOutcome
from quantkit.results.verdict import GateOutcome, Verdict

_MOST_CASES = 60
_LONGEST = 6000  # characters of a prompt or an answer


@dataclass(frozen=True)
class Chapter:
    """A section of charts, with a table below them."""

    id: str
    heading: str
    note: str
    panels: Sequence[Panel]
    table: Detail | None = None


@dataclass(frozen=True)
class BrokenAnswer:
    """One artifact's answer, as its difference from the baseline's. reason: why it fails."""

    name: str
    reason: str
    pieces: Sequence[Piece]


@dataclass(frozen=True)
class BrokenCase:
    """A case that the baseline passes, with the answers of the artifacts that fail it."""

    id: str
    critical: bool
    tags: Sequence[str]
    prompt: str
    expected: str
    baseline_answer: str
    answers: Sequence[BrokenAnswer]


@dataclass(frozen=True)
class ArtifactCard:
    """The trade-off card of an artifact, and what the page shows with it.

    reasons: the gates that didn't pass; losses, patch: of the localization; recipe: as YAML.
    """

    trade: tradeoff.Card
    description: str
    reasons: Sequence[str]
    gates: Sequence[dict[str, str]]
    losses: Detail | None
    patch: str
    provenance: Sequence[tuple[str, str]]
    recipe: str


def comparison_html(comparison: Comparison) -> str:
    """The whole page as text."""
    broken = _broken(comparison)
    judged = [row for row in comparison.variants if row.quality and row.quality.regression]
    chapters = [chapter for chapter in _chapters(comparison) if chapter.panels]
    contents = [("table", "Table"), *((chapter.id, chapter.heading) for chapter in chapters)]
    contents += [("broken", "Broken cases")] if judged else []
    contents += [("artifacts", "Artifacts"), ("differs", "What differs")]
    contents += [("provenance", "Provenance")]
    folder = files("quantkit.reports.html")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string((folder / "report.html.j2").read_text(encoding="utf-8"))
    return template.render(
        comparison=comparison,
        title=_title(comparison),
        style=Markup((folder / "report.css").read_text(encoding="utf-8")),
        summary=_summary(comparison),
        contents=contents,
        grid=table(comparison.models),
        references=1 + len(comparison.references),
        chapters=chapters,
        judged=bool(judged),
        broken=broken[:_MOST_CASES],
        left_out=max(len(broken) - _MOST_CASES, 0),
        cards=[
            _card(*pair)
            for pair in zip(tradeoff.cards(comparison), comparison.variants, strict=True)
        ],
        missing=missing(comparison.models),
        occasion=_occasion(comparison),
    )


def _title(comparison: Comparison) -> str:
    model = comparison.occasion.model if comparison.occasion else comparison.baseline.path
    count = len(comparison.variants)
    return f"{model_name(model) or model}: {count} artifact{'s' * (count != 1)}"


def _summary(comparison: Comparison) -> str:
    """The verdicts in a sentence."""
    variants, base = comparison.variants, comparison.baseline.name
    if comparison.verdict is None:
        return f"The suite has no gates: figures of {len(variants)} artifacts against {base}."
    counts = {value: sum(row.verdict == value for row in variants) for value in Verdict}
    parts = [
        f"{counts[value]} {words}"
        for value, words in (
            (Verdict.PASS, "passed every gate"),
            (Verdict.FAIL, "failed at least one"),
            (Verdict.INCONCLUSIVE, "need more samples to be decided"),
        )
        if counts[value]
    ]
    return f"Of {len(variants)} artifacts, judged against {base}: {', '.join(parts)}."


def _chapters(comparison: Comparison) -> list[Chapter]:
    return [
        Chapter(
            "quality",
            "Quality",
            "",
            figures.size_panels(comparison) + figures.divergence_panels(comparison),
        ),
        Chapter(
            "cost",
            "Memory and throughput",
            "Each model in a process of its own. Rates are medians; engines differ where the table "
            "says so. Grey: not quantized.",
            figures.cost_panels(comparison),
        ),
        Chapter(
            "layers",
            "Error by layer",
            "From each artifact's manifest. Shades are on a log scale, and shared by artifacts "
            "whose errors are measured alike.",
            figures.layer_panels(comparison),
        ),
        Chapter(
            "experts",
            "Tokens with other experts",
            "Shades are on a log scale.",
            figures.experts_panels(comparison),
            experts_table(comparison.models),
        ),
        Chapter(
            "slices",
            "Regression cases by tag",
            "Dot: the artifact; ring: the baseline; line: the artifact's 95% interval.",
            figures.slice_panels(comparison),
            slice_table(comparison.variants),
        ),
    ]


def _broken(comparison: Comparison) -> list[BrokenCase]:
    """The broken cases with the artifacts that break them, critical and most broken ones first."""
    inputs = {case.id: case for case in comparison.cases}
    outcomes_by_case: dict[str, list[tuple[Variant, CaseOutcome]]] = {}
    for row in comparison.variants:
        regression = row.quality.regression if row.quality else None
        for case in regression.cases if regression else ():
            if case.baseline_passed and not case.passed:
                outcomes_by_case.setdefault(case.id, []).append((row, case))
    broken = []
    for name, outcomes in outcomes_by_case.items():
        case, given = outcomes[0][1], inputs.get(name)
        answers = [
            BrokenAnswer(
                row.name,
                _cut(failures(outcome)),
                changes(_cut(case.baseline_answer), _cut(outcome.answer)),
            )
            for row, outcome in outcomes
        ]
        broken.append(
            BrokenCase(
                id=name,
                critical=case.critical,
                tags=case.tags,
                prompt=_cut(given.prompt) if given else "",
                expected=given.expected if given else "",
                baseline_answer=_cut(case.baseline_answer),
                answers=answers,
            )
        )
    return sorted(broken, key=lambda case: (not case.critical, -len(case.answers)))


def _card(card: tradeoff.Card, variant: Variant) -> ArtifactCard:
    made = variant.manifest
    recipe = made.recipe.content if isinstance(made, QuantizedManifest) else None
    lost = variant.localization
    return ArtifactCard(
        trade=card,
        description=(recipe or {}).get("description") or "",
        reasons=[gate_sentence(gate) for gate in variant.gates if not gate.passed],
        gates=[_gate(gate) for gate in variant.gates],
        losses=None
        if lost is None
        else Detail("Where it loses quality", HEADERS, tuple(rows(lost)), ""),
        patch="" if lost is None else summary(lost),
        provenance=_provenance(variant),
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True) if recipe else "",
    )


def _gate(gate: GateOutcome) -> dict[str, str]:
    return {"verdict": gate.verdict.value, "sentence": gate_sentence(gate)}


def _provenance(variant: Variant) -> list[tuple[str, str]]:
    """Names and values, from quantkit.json and run.json."""
    manifest, run = variant.manifest, variant.run
    pairs = [("path", variant.path)]
    if manifest is None:
        return [*pairs, ("manifest", "none: not made by quantkit")]
    if isinstance(manifest, QuantizedManifest):
        recipe = manifest.recipe
        pairs.append(("recipe", f"{recipe.name} {recipe.version}, sha256 {recipe.digest}"))
    if run is not None:
        pairs.append(("made of", run.model))
    for name, digest in manifest.source.files.items():
        pairs.append((f"source: {name}", f"sha256 {digest}"))
    for adapter in manifest.adapters:
        pairs.append(("adapter", f"{adapter.name}, weight {adapter.weight}"))
    if isinstance(manifest, QuantizedManifest) and manifest.calibration is not None:
        pairs.append(("calibration text", f"sha256 {manifest.calibration.dataset_sha256}"))
    for name, file in manifest.files.items():
        pairs.append((name, f"{file.bytes:,} bytes, sha256 {file.sha256}"))
    pairs.append(("quantkit", manifest.quantkit))
    pairs.append(("libraries", _joined(manifest.libraries)))
    if run is not None:
        pairs.append(("made", f"{run.finished}, in {run.seconds:g} s on {run.device}"))
        pairs.append(("machine", _joined(run.machine)))
    return pairs


def _occasion(comparison: Comparison) -> dict[str, Any] | None:
    occasion = comparison.occasion
    if occasion is None:
        return None
    pairs = [
        ("baseline", f"{occasion.model} ({comparison.baseline.path})"),
        ("suite", f"{comparison.suite}, sha256 {occasion.suite_digest}"),
        ("finished", occasion.finished),
        ("quantkit", occasion.quantkit),
        ("libraries", _joined(occasion.libraries)),
        ("machine", _joined(occasion.machine)),
    ]
    return {"finished": _moment(occasion.finished), "quantkit": occasion.quantkit, "pairs": pairs}


def _moment(stamp: str) -> str:
    """An ISO 8601 time in UTC as people write it, to the minute."""
    return f"{stamp[:16].replace('T', ' ')} UTC"


def _joined(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _cut(text: str) -> str:
    return writable(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…")
