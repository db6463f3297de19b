"""The comparison as Markdown."""

from __future__ import annotations

from collections.abc import Iterable

from quantkit.reports.cells import notes, table
from quantkit.reports.details import details
from quantkit.reports.losses import losses_markdown
from quantkit.reports.tradeoff import Card, cards
from quantkit.results.comparison import Comparison


def comparison_markdown(comparison: Comparison) -> str:
    """The main table, the gates and slices, notes, and a card for each artifact."""
    grid = table(comparison.models)
    lines = ["# Comparison", ""]
    if comparison.suite:
        lines += [f"Suite {comparison.suite}: **{comparison.verdict or 'no gates'}**", ""]
    if comparison.goal:
        lines += [f"Goal: {_escaped(comparison.goal)}", ""]
    lines.append(_row(("", *grid.headers)))
    lines.append("|---|" + "---:|" * len(grid.headers))
    for section in grid.sections:
        lines.append(f"| **{section.title}** |" + " |" * len(grid.headers))
        for row in section.rows:
            label = f"{row.label} {row.better}".strip()
            lines.append(_row((label, *row.cells)))
    lines.append("")
    for detail in details(comparison):
        lines += [f"## {detail.title}", ""]
        lines += [_row(detail.headers), "|" + "---|" * len(detail.headers)]
        lines += [_row(row) for row in detail.rows]
        lines += ["", *([detail.note, ""] if detail.note else [])]
    lines += ["## Notes", ""]
    lines += [f"- {_escaped(note)}" for note in notes(comparison)]
    for variant in comparison.variants:
        if variant.localization is not None:
            lines += ["", *losses_markdown(variant.name, variant.localization)]
    for card in cards(comparison):
        lines += ["", *_card(card)]
    return "\n".join(lines) + "\n"


def _card(card: Card) -> list[str]:
    """The trade-off, and the checklist as a task list, ticked where the evidence supports it."""
    lines = [f"## {card.name}" + (f": {card.verdict}" if card.verdict else ""), ""]
    lines += [card.against, ""] if card.against else []
    for heading, texts in (
        ("Gained", card.gained),
        ("Given up", card.given_up),
        ("Kept", card.kept),
    ):
        lines.append(f"- **{heading}:** {_escaped('; '.join(texts)) or 'nothing measured'}")
    lines += ["", "Launch checklist:", ""]
    for item in card.checklist:
        if item.statement is None:
            lines.append(f"- [ ] **{item.topic}:** empty: {_escaped(item.missing)}")
            continue
        mark = "x" if item.holds else " "
        lines.append(
            f"- [{mark}] **{item.topic}:** {_escaped(item.statement)} "
            f"(evidence: {_escaped(item.evidence)})"
        )
    return lines


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(_escaped(cell) for cell in cells) + " |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "⏎")
