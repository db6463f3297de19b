"""Comparisons and plans as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from quantkit.plan.base import Plan
from quantkit.reports.cells import table as cells
from quantkit.reports.details import Detail, details
from quantkit.results.comparison import Comparison, Variant

_COLORS = {"PASS": "green", "FAIL": "bold red", "INCONCLUSIVE": "yellow"}


def comparison_tables(comparison: Comparison) -> Group:
    """The main table, and below it the gates and slices."""
    verdict = f" · {comparison.verdict}" if comparison.verdict else ""
    suite = f" · suite {comparison.suite}" if comparison.suite else ""
    main = models_table(comparison.models, f"Comparison{suite}{verdict}")
    below = [part for detail in details(comparison) for part in (_detail_table(detail), "")]
    return Group(main, *below)


def models_table(models: Sequence[Variant], title: str) -> Table:
    """The models side by side, figures down and models across."""
    grid = cells(models)
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("")
    for header in grid.headers:
        table.add_column(escape(header), justify="right", overflow="fold")
    for section in grid.sections:
        for row in section.rows:
            label = f"{row.label} {row.better}".strip()
            table.add_row(label, *(_colored(cell) for cell in row.cells))
        table.add_section()
    return table


def _detail_table(detail: Detail) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        title=detail.title,
        title_justify="left",
        caption=detail.note or None,
        caption_justify="left",
    )
    for header in detail.headers:
        table.add_column(header, overflow="fold")
    for row in detail.rows:
        table.add_row(*(_colored(cell) for cell in row))
    return table


def plan_table(plan: Plan, name: str) -> Table:
    """What an artifact will hold or holds; tensors that differ only by their layer share a row."""
    total = f"{plan.nbytes / 1e6:,.1f} MB, {plan.bits_per_weight:.3f} bits a weight"
    if plan.quantized_bits_per_weight is not None:
        total += f" ({plan.quantized_bits_per_weight:.3f} in the quantized part)"
    table = Table(box=box.SIMPLE_HEAD, title=f"{name}: {total}", title_justify="left")
    table.add_column("tensors")
    table.add_column("scheme")
    for header in ("count", "weights", "MB", "bits/weight"):
        table.add_column(header, justify="right")
    for row in plan.rows():
        table.add_row(
            escape(row.name),
            escape(row.scheme),
            str(row.count),
            f"{row.weights:,}",
            f"{row.nbytes / 1e6:,.2f}",
            f"{row.bits_per_weight:.3f}",
        )
    return table


def listing(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A plain table with headers."""
    table = Table(box=box.SIMPLE_HEAD)
    for header in headers:
        table.add_column(header)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def _colored(cell: str) -> str:
    color = _COLORS.get(cell)
    return f"[{color}]{cell}[/]" if color else escape(cell)
