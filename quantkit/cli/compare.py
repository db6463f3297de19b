"""quantkit compare"""

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
    ArtifactsArg,
    BaselineOpt,
    DeviceOpt,
    GoalOpt,
    JsonOpt,
    LocateOpt,
    NewOpt,
    PromptOpt,
    RepeatsOpt,
    SuiteOpt,
    ThreadsOpt,
    parse_adapters,
)


@app.command("compare", epilog=EXIT_CODES)
@handles_errors
def compare_command(
    artifacts: ArtifactsArg,
    baseline: BaselineOpt,
    suite: SuiteOpt,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Directory for the report, in every form.")
    ],
    adapters: AdapterOpt = None,
    goal: GoalOpt = None,
    bench: Annotated[bool, typer.Option(help="Measure cost too.")] = True,
    locate: LocateOpt = None,
    prompt_tokens: PromptOpt = quantkit.Load.prompt_tokens,
    new_tokens: NewOpt = quantkit.Load.new_tokens,
    repeats: RepeatsOpt = quantkit.Load.repeats,
    threads: ThreadsOpt = None,
    device: DeviceOpt = "cpu",
    allow_code: AllowCodeOpt = False,
    allow_overlap: AllowOverlapOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Judge and measure artifacts: one table, a verdict, and the way back."""
    from quantkit.cli.console import Console

    console = Console(as_json=as_json)
    load = quantkit.Load(prompt_tokens, new_tokens, repeats, threads, device)
    comparison = quantkit.compare(
        artifacts,
        baseline=baseline,
        suite=suite,
        adapters=parse_adapters(adapters),
        out=out,
        device=device,
        load=load if bench else None,
        localize=locate,
        goal=goal,
        allow_code=allow_code,
        allow_overlap=allow_overlap,
        progress=console,
    )
    finish(console, comparison)
