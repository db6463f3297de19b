"""How eval, compare and sweep end: the comparison's tables, its notes, and its exit code."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import typer

from quantkit.base.errors import ExitCode

if TYPE_CHECKING:
    from quantkit.cli.console import Console
    from quantkit.results.comparison import Comparison


def finish(console: Console, comparison: Comparison) -> None:
    """Print a comparison, and leave with the exit code of its verdict.

    In a step of GitHub Actions the step's summary gets the comparison too.
    """
    from quantkit.reports.cells import notes
    from quantkit.reports.files import append_step_summary
    from quantkit.reports.losses import losses_table, summary
    from quantkit.reports.terminal import comparison_tables
    from quantkit.results.verdict import Verdict

    console.show(comparison.to_json(), comparison_tables(comparison))
    for variant in comparison.variants:
        if variant.localization is not None and not console.as_json:
            console.show(None, losses_table(variant.name, variant.localization))
            console.show(None, summary(variant.localization))
    for note in notes(comparison):
        console.note(note)
    if appended := append_step_summary(comparison, os.environ):
        console.note(f"appended: {appended}")
    codes = {Verdict.FAIL: ExitCode.GATE_FAILED, Verdict.INCONCLUSIVE: ExitCode.INCONCLUSIVE}
    if comparison.verdict in codes:
        raise typer.Exit(int(codes[comparison.verdict]))
