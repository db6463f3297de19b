"""The comparison as Markdown."""

from __future__ import annotations

from quantkit.reports.cells import notes, table
from quantkit.reports.tradeoff import Card, cards
from quantkit.results import Comparison


def comparison_markdown(comparison: Comparison) -> str:
    """The table with figures down and models across, the notes, a card for each artifact."""
    grid = table(comparison.models)
    lines = ["# Comparison", ""]
    if comparison.suite:
        lines += [f"Suite {comparison.suite}: **{comparison.verdict or 'no gates'}**", ""]
    if comparison.goal:
        lines += [f"Goal: {_escaped(comparison.goal)}", ""]
    lines.append("| | " + " | ".join(grid.headers) + " |")
    lines.append("|---|" + "---:|" * len(grid.headers))
    for section in grid.sections:
        lines.append(f"| **{section.title}** |" + " |" * len(grid.headers))
        for row in section.rows:
            label = f"{row.label} {row.better}".strip()
            lines.append(f"| {label} | " + " | ".join(_escaped(cell) for cell in row.cells) + " |")
    lines.append("")
    lines += [f"- {_escaped(note)}" for note in notes(comparison)]
    for card in cards(comparison):
        lines += ["", *_card(card)]
    return "\n".join(lines) + "\n"


def _card(card: Card) -> list[str]:
    """What was traded, and the checklist as a task list: ticked where there is evidence."""
    lines = [f"## {card.name}" + (f": {card.verdict}" if card.verdict else ""), ""]
    lines += [card.against, ""] if card.against else []
    for heading, found in (
        ("Gained", card.gained),
        ("Given up", card.given_up),
        ("Kept", card.kept),
    ):
        lines.append(f"- **{heading}:** {_escaped('; '.join(found)) or 'nothing measured'}")
    lines += ["", "Launch checklist:", ""]
    for item in card.checklist:
        if item.said is None:
            lines.append(f"- [ ] **{item.topic}:** empty: {_escaped(item.missing)}")
            continue
        mark = "x" if item.holds else " "
        said = f"**{item.topic}:** {_escaped(item.said)} (evidence: {_escaped(item.evidence)})"
        lines.append(f"- [{mark}] {said}")
    return lines


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "⏎")
