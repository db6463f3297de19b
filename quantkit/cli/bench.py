"""quantkit bench"""

from __future__ import annotations

from typing import Annotated

import typer

import quantkit
from quantkit.cli.app import EXIT_CODES, app, handles_errors
from quantkit.cli.options import (
    ArtifactsArg,
    DeviceOpt,
    JsonOpt,
    NewOpt,
    OutFileOpt,
    PromptOpt,
    RepeatsOpt,
    ThreadsOpt,
)


@app.command("bench", epilog=EXIT_CODES)
@handles_errors
def bench_command(
    artifacts: ArtifactsArg,
    baseline: Annotated[
        str | None, typer.Option(help="BF16 checkpoint to measure beside them.")
    ] = None,
    out: OutFileOpt = None,
    prompt_tokens: PromptOpt = quantkit.Load.prompt_tokens,
    new_tokens: NewOpt = quantkit.Load.new_tokens,
    repeats: RepeatsOpt = quantkit.Load.repeats,
    threads: ThreadsOpt = None,
    device: DeviceOpt = quantkit.Load.device,
    as_json: JsonOpt = False,
) -> None:
    """Measure memory, latency and throughput, each artifact in a fresh process."""
    from quantkit.cli.console import Console
    from quantkit.reports.cells import missing
    from quantkit.reports.terminal import models_table

    console = Console(as_json=as_json)
    load = quantkit.Load(prompt_tokens, new_tokens, repeats, threads, device)
    rows = quantkit.bench(artifacts, baseline=baseline, load=load, out=out, progress=console)
    console.show([row.to_json() for row in rows], models_table(rows, "Cost"))
    for text in missing(rows):
        console.note(f"Missing: {text}")
