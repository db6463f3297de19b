"""quantkit sweep"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import quantkit
from quantkit.cli.app import EXIT_CODES, app, handles_errors
from quantkit.cli.comparison import finish
from quantkit.cli.options import (
    AdapterOpt,
    AllowCodeOpt,
    AllowOverlapOpt,
    BudgetOpt,
    CacheOpt,
    DevicesOpt,
    ForceOpt,
    GoalOpt,
    JsonOpt,
    LocateOpt,
    ModelOpt,
    ResumeOpt,
    SetOpt,
    StrictOpt,
    TextOnlyOpt,
    parse_adapters,
    parse_optional_size,
)


@app.command("sweep", epilog=EXIT_CODES)
@handles_errors
def sweep_command(
    recipes: Annotated[list[str], typer.Argument(help="Recipe files, or names of shipped ones.")],
    model: ModelOpt,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Directory for the artifacts and the comparison.")
    ],
    suite: Annotated[
        str | None, typer.Option(help="Judge them by this suite; sizes only if unset.")
    ] = None,
    device: DevicesOpt = "auto",
    adapters: AdapterOpt = None,
    strict: StrictOpt = False,
    text_only: TextOnlyOpt = False,
    settings: SetOpt = None,
    force: ForceOpt = False,
    memory_budget: BudgetOpt = None,
    cache: CacheOpt = True,
    resume: ResumeOpt = True,
    bench: Annotated[bool, typer.Option(help="Measure cost too (with --suite).")] = False,
    locate: LocateOpt = None,
    allow_code: AllowCodeOpt = False,
    allow_overlap: AllowOverlapOpt = False,
    goal: GoalOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Make an artifact by each of many recipes, calibrating once, and compare them in a table.

    Artifacts that are there already, made from the same inputs, are kept.
    """
    from quantkit.cli.console import Console
    from quantkit.reports.terminal import models_table

    console = Console(as_json=as_json)
    result = quantkit.sweep(
        [quantkit.load_recipe(recipe, settings or ()) for recipe in recipes],
        model=model,
        out=out,
        suite=suite,
        adapters=parse_adapters(adapters),
        strict=strict,
        text_only=text_only,
        device=device,
        force=force,
        memory_budget=parse_optional_size(memory_budget, "--memory-budget"),
        cache=cache,
        resume=resume,
        load=quantkit.Load() if bench else None,
        localize=locate,
        goal=goal,
        allow_code=allow_code,
        allow_overlap=allow_overlap,
        progress=console,
    )
    if result.comparison is not None:
        finish(console, result.comparison)
        return
    rows = [variant.to_json() for variant in result.variants]
    console.show(rows, models_table(result.variants, "Artifacts"))
