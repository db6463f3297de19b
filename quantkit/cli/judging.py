"""Commands that judge: eval, bench, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.app import (
    EXIT_CODES,
    AdapterOpt,
    ArtifactsArg,
    BaselineOpt,
    DeviceOpt,
    JsonOpt,
    LocateOpt,
    NewOpt,
    PromptOpt,
    RepeatsOpt,
    SuiteOpt,
    ThreadsOpt,
    app,
    reported,
)
from quantkit.cli.verdict import finish, judge, write_comparison


@app.command("eval", epilog=EXIT_CODES)
@reported
def eval_command(
    artifacts: ArtifactsArg,
    baseline: BaselineOpt,
    suite: SuiteOpt,
    adapters: AdapterOpt = None,
    locate: LocateOpt = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write JSON here.")] = None,
    device: DeviceOpt = "cpu",
    as_json: JsonOpt = False,
) -> None:
    """Judge artifacts by a suite, against the BF16 baseline."""
    from quantkit.console import Console
    from quantkit.suite import load_suite

    console = Console(as_json=as_json)
    loaded = load_suite(suite)
    comparison = judge(console, artifacts, (baseline, adapters), loaded, device, locating=locate)
    finish(console, comparison, out)


@app.command("bench", epilog=EXIT_CODES)
@reported
def bench_command(
    artifacts: ArtifactsArg,
    baseline: Annotated[
        str | None, typer.Option(help="BF16 checkpoint to measure beside them.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write JSON here.")] = None,
    prompt_tokens: PromptOpt = 128,
    new_tokens: NewOpt = 32,
    repeats: RepeatsOpt = 3,
    threads: ThreadsOpt = None,
    device: DeviceOpt = "cpu",
    as_json: JsonOpt = False,
) -> None:
    """Measure memory, latency and throughput, each artifact in a fresh process."""
    from quantkit.checkpoint.reader import Checkpoint
    from quantkit.checkpoint.source import locate
    from quantkit.checkpoint.writer import write_json
    from quantkit.compare import describe_costs
    from quantkit.console import Console
    from quantkit.measure import Load, measure
    from quantkit.reports.terminal import models_table

    console = Console(as_json=as_json)
    load = Load(prompt_tokens, new_tokens, repeats, threads, device)
    source = None if baseline is None else Checkpoint(locate(baseline))
    costs = measure(artifacts, source, load, console)
    rows = describe_costs(source, artifacts, costs)
    values = [row.to_json() for row in rows]
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, values)
    console.show(values, models_table(rows, "Cost"))


@app.command("compare", epilog=EXIT_CODES)
@reported
def compare_command(
    artifacts: ArtifactsArg,
    baseline: BaselineOpt,
    suite: SuiteOpt,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Directory for comparison.md and comparison.json.")
    ],
    adapters: AdapterOpt = None,
    bench: Annotated[bool, typer.Option(help="Measure cost too.")] = True,
    locate: LocateOpt = None,
    prompt_tokens: PromptOpt = 128,
    new_tokens: NewOpt = 32,
    repeats: RepeatsOpt = 3,
    threads: ThreadsOpt = None,
    device: DeviceOpt = "cpu",
    as_json: JsonOpt = False,
) -> None:
    """Judge and measure artifacts: one table, a verdict, and the way back."""
    from quantkit.console import Console
    from quantkit.measure import Load
    from quantkit.suite import load_suite

    console = Console(as_json=as_json)
    loaded = load_suite(suite)
    load = Load(prompt_tokens, new_tokens, repeats, threads, device) if bench else None
    comparison = judge(console, artifacts, (baseline, adapters), loaded, device, load, locate)
    write_comparison(console, comparison, out)
    finish(console, comparison, None)
