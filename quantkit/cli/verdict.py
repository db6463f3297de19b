"""From a suite and artifacts to a verdict, and its exit code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from quantkit.base.errors import ExitCode
from quantkit.cli.app import with_weight

if TYPE_CHECKING:
    from quantkit.checkpoint.reader import Checkpoint
    from quantkit.cli.console import Console
    from quantkit.commands.bench import Load
    from quantkit.recipes.suite import LoadedSuite
    from quantkit.results.comparison import Comparison


def judge(
    console: Console,
    artifacts: list[Path],
    baseline: tuple[str, list[str] | None],
    suite: LoadedSuite,
    device: str,
    load: Load | None = None,
    *,
    locating: bool | None = None,
    goal: str | None = None,
    allow_code: bool = False,
    allow_overlap: bool = False,
) -> Comparison:
    """Evaluate, measure where a load is given, and compare. ``baseline`` may have adapters.

    locating: whether to look for the layers that lose most; where a gate failed if None.
    """
    from quantkit.checkpoint.reader import Checkpoint
    from quantkit.checkpoint.source import locate
    from quantkit.commands.bench import measure
    from quantkit.commands.compare import compare
    from quantkit.commands.eval import evaluate

    model, adapters = baseline
    source = Checkpoint(locate(model))
    if adapters:
        from quantkit.lora.open import adapt

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
    comparison = compare(source, artifacts, suite, qualities, costs, model=model, goal=goal)
    return _located(console, comparison, source, suite, device, locating)


def _located(
    console: Console,
    comparison: Comparison,
    baseline: Checkpoint,
    suite: LoadedSuite,
    device: str,
    locating: bool | None,
) -> Comparison:
    """The comparison with a localisation for each artifact that failed, or for all."""
    from dataclasses import replace

    from quantkit.judging.localize import locate
    from quantkit.results.verdict import Verdict

    variants = []
    for variant in comparison.variants:
        if locating or (locating is None and variant.verdict is Verdict.FAIL):
            found = locate(variant, baseline, suite, device=device, progress=console)
            variant = replace(variant, localisation=found)
        variants.append(variant)
    return replace(comparison, variants=tuple(variants))


def write_comparison(console: Console, comparison: Comparison, out: Path) -> None:
    from quantkit.reports.files import write_reports

    written = write_reports(comparison, out)
    console.note(f"written in {out}: {', '.join(path.name for path in written)}")
    write_fixed(console, comparison, out)


def write_fixed(console: Console, comparison: Comparison, out: Path) -> None:
    """Recipes that fix what failed, as files that can be run."""
    import yaml

    for variant in comparison.variants:
        if variant.localisation is not None and variant.localisation.patch is not None:
            content = variant.localisation.patch.recipe
            path = out / f"{content['name']}.yaml"
            text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
            path.write_text(text, encoding="utf-8")
            console.note(f"written: {path}, to quantize by instead of {variant.name}")


def finish(console: Console, comparison: Comparison, out: Path | None) -> None:
    """Print a comparison and leave with the code of its verdict.

    In a step of GitHub Actions its summary gets the comparison too.
    """
    from quantkit.base.files import write_json
    from quantkit.reports.cells import notes
    from quantkit.reports.files import append_step_summary
    from quantkit.reports.losses import losses_table, summary
    from quantkit.reports.terminal import comparison_tables
    from quantkit.results.verdict import Verdict

    value = comparison.to_json()
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, value)
        write_fixed(console, comparison, out.parent)
    console.show(value, comparison_tables(comparison))
    for variant in comparison.variants:
        if variant.localisation is not None and not console.as_json:
            console.show(None, losses_table(variant.name, variant.localisation))
            console.show(None, summary(variant.localisation))
    for note in notes(comparison):
        console.note(note)
    if appended := append_step_summary(comparison, os.environ):
        console.note(f"appended: {appended}")
    codes = {Verdict.FAIL: ExitCode.GATE_FAILED, Verdict.INCONCLUSIVE: ExitCode.INCONCLUSIVE}
    if comparison.verdict in codes:
        raise typer.Exit(int(codes[comparison.verdict]))
