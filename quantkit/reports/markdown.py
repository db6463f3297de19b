"""The comparison as Markdown."""

from __future__ import annotations

from collections.abc import Iterable

from quantkit.reports.cells import notes, table
from quantkit.reports.details import details
from quantkit.reports.losses import losses_markdown
from quantkit.results import Comparison


def comparison_markdown(comparison: Comparison) -> str:
    """A heading, the table with figures down and models across, details and notes."""
    grid = table(comparison.models)
    lines = ["# Comparison", ""]
    if comparison.suite:
        lines += [f"Suite {comparison.suite}: **{comparison.verdict or 'no gates'}**", ""]
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
        if variant.localisation is not None:
            lines += ["", *losses_markdown(variant.name, variant.localisation)]
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(_escaped(cell) for cell in cells) + " |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "⏎")
