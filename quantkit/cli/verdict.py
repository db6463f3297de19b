"""From a suite and artifacts to a verdict, and its exit code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from quantkit.cli.app import with_weight
from quantkit.errors import ExitCode

if TYPE_CHECKING:
    from quantkit.console import Console
    from quantkit.measure import Load
    from quantkit.results import Comparison
    from quantkit.suite import LoadedSuite


def judge(
    console: Console,
    artifacts: list[Path],
    baseline: tuple[str, list[str] | None],
    suite: LoadedSuite,
    device: str,
    load: Load | None = None,
    *,
    goal: str | None = None,
    allow_code: bool = False,
    allow_overlap: bool = False,
) -> Comparison:
    """Evaluate, measure where a load is given, and compare. ``baseline`` may have adapters."""
    from quantkit.checkpoint.reader import Checkpoint
    from quantkit.checkpoint.source import locate
    from quantkit.compare import compare
    from quantkit.evaluate import evaluate
    from quantkit.measure import measure

    model, adapters = baseline
    source = Checkpoint(locate(model))
    if adapters:
        from quantkit.model.adapt import adapt

        source = adapt(source, [with_weight(adapter) for adapter in adapters], model)
    qualities = evaluate(
        artifacts,
        source,
        suite,
        device=device,
        progress=console,
        allow_code=allow_code,
        allow_overlap=allow_overlap,
    )
    costs = None if load is None else measure(artifacts, source, load, console)
    return compare(source, artifacts, suite, qualities, costs, model=model, goal=goal)


def write_comparison(console: Console, comparison: Comparison, out: Path) -> None:
    from quantkit.reports.files import write_reports

    written = write_reports(comparison, out)
    console.note(f"written in {out}: {', '.join(path.name for path in written)}")


def finish(console: Console, comparison: Comparison, out: Path | None) -> None:
    """Print a comparison and leave with the code of its verdict.

    In a step of GitHub Actions its summary gets the comparison too.
    """
    from quantkit.checkpoint.writer import write_json
    from quantkit.reports.cells import notes
    from quantkit.reports.files import append_step_summary
    from quantkit.reports.terminal import comparison_tables
    from quantkit.results import Verdict

    value = comparison.to_json()
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, value)
    console.show(value, comparison_tables(comparison))
    for note in notes(comparison):
        console.note(note)
    if summary := append_step_summary(comparison, os.environ):
        console.note(f"appended: {summary}")
    codes = {Verdict.FAIL: ExitCode.GATE_FAILED, Verdict.INCONCLUSIVE: ExitCode.INCONCLUSIVE}
    if comparison.verdict in codes:
        raise typer.Exit(int(codes[comparison.verdict]))
