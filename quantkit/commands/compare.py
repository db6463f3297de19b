"""compare: artifacts judged and measured against their baseline, and a report of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantkit.base.output import check_folder
from quantkit.base.progress import Progress
from quantkit.checkpoint.reader import Checkpoint
from quantkit.commands.eval import JudgingOptions, evaluate, write_fixed_recipes
from quantkit.recipes.suite import LoadedSuite
from quantkit.reports.files import write_reports
from quantkit.results.comparison import Comparison


def compare(
    artifacts: Sequence[Path],
    baseline: Checkpoint,
    suite: LoadedSuite,
    options: JudgingOptions,
    *,
    out: Path | None,
    model: str,
    progress: Progress,
) -> Comparison:
    """Judge and measure artifacts, and write the report in every form into ``out``, if given.

    model: the baseline's name as the user gave it.

    Raises QuantkitError; a report is written only of a whole comparison.
    """
    if out is not None:
        check_folder(out)
    comparison = evaluate(artifacts, baseline, suite, options, model=model, progress=progress)
    if out is not None:
        written = write_reports(comparison, out)
        progress.note(f"written in {out}: {', '.join(path.name for path in written)}")
        write_fixed_recipes(comparison, out, progress)
    return comparison
