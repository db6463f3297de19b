"""The comparison as one HTML page that needs nothing else: no request, no script.

Text is escaped by the template; the page's Content-Security-Policy forbids whatever would load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from quantkit.reports import tradeoff
from quantkit.reports.cells import failures, gate_said, missing, table
from quantkit.reports.changes import Piece, changes
from quantkit.reports.details import Detail, slices
from quantkit.reports.html import figures
from quantkit.reports.html.figures import Panel
from quantkit.reports.losses import HEADERS, rows, summary
from quantkit.reports.text import writable
from quantkit.results.comparison import Comparison, Variant
from quantkit.results.regression import CaseOutcome
from quantkit.results.verdict import GateOutcome, Verdict

_MOST_CASES = 60
_LONGEST = 6000  # characters of a prompt or an answer


@dataclass(frozen=True)
class Chapter:
    """Charts under one heading, and a table below them."""

    id: str
    heading: str
    note: str
    panels: Sequence[Panel]
    table: Detail | None = None


@dataclass(frozen=True)
class BrokenAnswer:
    """What one artifact answered, against the baseline's answer."""

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
    """The trade-off card, with why the verdict is what it is, gates and provenance."""

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
        missing=missing(comparison),
        occasion=_occasion(comparison),
    )


def _title(comparison: Comparison) -> str:
    model = comparison.occasion.model if comparison.occasion else comparison.baseline.path
    count = len(comparison.variants)
    return f"{Path(model).name or model}: {count} artifact{'s' * (count != 1)}"


def _summary(comparison: Comparison) -> str:
    """The verdict in a sentence."""
    variants, base = comparison.variants, comparison.baseline.name
    if comparison.verdict is None:
        return f"The suite has no gates: figures of {len(variants)} artifacts against {base}."
    counts = {value: sum(row.verdict == value for row in variants) for value in Verdict}
    said = [
        f"{counts[value]} {words}"
        for value, words in (
            (Verdict.PASS, "passed every gate"),
            (Verdict.FAIL, "failed at least one"),
            (Verdict.INCONCLUSIVE, "can't be told from so few samples"),
        )
        if counts[value]
    ]
    return f"Of {len(variants)} artifacts, judged against {base}: {', '.join(said)}."


def _chapters(comparison: Comparison) -> list[Chapter]:
    return [
        Chapter(
            "quality",
            "Quality",
            "",
            figures.front(comparison) + figures.divergence(comparison),
        ),
        Chapter(
            "cost",
            "Memory and throughput",
            "Each model in a process of its own. Rates are medians; engines differ where the table "
            "says so. Grey: not quantized.",
            figures.costs(comparison),
        ),
        Chapter(
            "layers",
            "Error by layer",
            "From each artifact's manifest. Shades are on a log scale, and shared by artifacts "
            "whose errors are measured alike.",
            figures.layers(comparison),
        ),
        Chapter(
            "slices",
            "Regression cases by tag",
            "Dot: the artifact; ring: the baseline; line: the artifact's 95% interval.",
            figures.slices(comparison),
            slices(comparison.variants),
        ),
    ]


def _broken(comparison: Comparison) -> list[BrokenCase]:
    """Broken cases, critical ones first, each with the artifacts that break it."""
    inputs = {case.id: case for case in comparison.cases}
    found: dict[str, list[tuple[Variant, CaseOutcome]]] = {}
    for row in comparison.variants:
        regression = row.quality.regression if row.quality else None
        for case in regression.cases if regression else ():
            if case.baseline_passed and not case.passed:
                found.setdefault(case.id, []).append((row, case))
    broken = []
    for name, outcomes in found.items():
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
                name,
                case.critical,
                case.tags,
                _cut(given.prompt) if given else "",
                given.expected if given else "",
                _cut(case.baseline_answer),
                answers,
            )
        )
    return sorted(broken, key=lambda case: (not case.critical, -len(case.answers)))


def _card(card: tradeoff.Card, variant: Variant) -> ArtifactCard:
    manifest = variant.manifest or {}
    recipe = manifest.get("recipe", {}).get("content")
    lost = variant.localisation
    return ArtifactCard(
        card,
        (recipe or {}).get("description") or "",
        [gate_said(gate) for gate in variant.gates if not gate.passed],
        [_gate(gate) for gate in variant.gates],
        None if lost is None else Detail("Where it loses", HEADERS, tuple(rows(lost)), ""),
        "" if lost is None else summary(lost),
        _provenance(variant),
        yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True) if recipe else "",
    )


def _gate(gate: GateOutcome) -> dict[str, str]:
    return {"verdict": gate.verdict.value, "said": gate_said(gate)}


def _provenance(variant: Variant) -> list[tuple[str, str]]:
    """Names and values, from quantkit.json and run.json."""
    manifest, run = variant.manifest, variant.run or {}
    pairs = [("path", variant.path)]
    if manifest is None:
        return [*pairs, ("manifest", "none: not made by quantkit")]
    if recipe := manifest.get("recipe"):
        pairs.append(("recipe", f"{recipe['name']} {recipe['version']}, sha256 {recipe['digest']}"))
    if model := run.get("model"):
        pairs.append(("made of", model))
    for name, digest in manifest.get("source", {}).get("files", {}).items():
        pairs.append((f"source: {name}", f"sha256 {digest}"))
    for adapter in manifest.get("adapters", []):
        pairs.append(("adapter", f"{adapter['name']}, weight {adapter['weight']}"))
    if calibration := manifest.get("calibration"):
        pairs.append(("calibration text", f"sha256 {calibration['dataset_sha256']}"))
    for name, file in manifest.get("files", {}).items():
        pairs.append((name, f"{file['bytes']:,} bytes, sha256 {file['sha256']}"))
    pairs.append(("quantkit", manifest.get("quantkit", "")))
    pairs.append(("libraries", _joined(manifest.get("libraries", {}))))
    if finished := run.get("finished"):
        took = f"{finished}, in {run.get('seconds', 0):g} s on {run.get('device', '?')}"
        pairs += [("made", took), ("machine", _joined(run.get("machine", {})))]
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
    """ISO 8601 in UTC as people write it, to the minute."""
    return f"{stamp[:16].replace('T', ' ')} UTC"


def _joined(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _cut(text: str) -> str:
    return writable(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…")
