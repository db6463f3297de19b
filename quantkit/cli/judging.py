"""Commands that judge: eval, bench, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.base.errors import InputError
from quantkit.cli.app import (
    EXIT_CODES,
    AdapterOpt,
    AllowCodeOpt,
    AllowOverlapOpt,
    ArtifactsArg,
    BaselineOpt,
    DeviceOpt,
    ForceOpt,
    GoalOpt,
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
    goal: GoalOpt = None,
    locate: LocateOpt = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write JSON here.")] = None,
    device: DeviceOpt = "cpu",
    allow_code: AllowCodeOpt = False,
    allow_overlap: AllowOverlapOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Judge artifacts by a suite, against the BF16 baseline."""
    from quantkit.cli.console import Console
    from quantkit.recipes.suite import load_suite

    console = Console(as_json=as_json)
    loaded = load_suite(suite)
    comparison = judge(
        console,
        artifacts,
        (baseline, adapters),
        loaded,
        device,
        locating=locate,
        goal=goal,
        allow_code=allow_code,
        allow_overlap=allow_overlap,
    )
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
    from quantkit.base.files import write_json
    from quantkit.checkpoint.reader import Checkpoint
    from quantkit.checkpoint.source import locate
    from quantkit.cli.console import Console
    from quantkit.commands.bench import Load, measure
    from quantkit.commands.compare import describe_costs
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
        Path, typer.Option("--out", "-o", help="Directory for the report, in every form.")
    ],
    adapters: AdapterOpt = None,
    goal: GoalOpt = None,
    bench: Annotated[bool, typer.Option(help="Measure cost too.")] = True,
    locate: LocateOpt = None,
    prompt_tokens: PromptOpt = 128,
    new_tokens: NewOpt = 32,
    repeats: RepeatsOpt = 3,
    threads: ThreadsOpt = None,
    device: DeviceOpt = "cpu",
    allow_code: AllowCodeOpt = False,
    allow_overlap: AllowOverlapOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Judge and measure artifacts: one table, a verdict, and the way back."""
    from quantkit.cli.console import Console
    from quantkit.commands.bench import Load
    from quantkit.recipes.suite import load_suite

    console = Console(as_json=as_json)
    loaded = load_suite(suite)
    load = Load(prompt_tokens, new_tokens, repeats, threads, device) if bench else None
    comparison = judge(
        console,
        artifacts,
        (baseline, adapters),
        loaded,
        device,
        load=load,
        locating=locate,
        goal=goal,
        allow_code=allow_code,
        allow_overlap=allow_overlap,
    )
    write_comparison(console, comparison, out)
    finish(console, comparison, None)


@app.command("report", epilog=EXIT_CODES)
@reported
def report_command(
    comparison: Annotated[Path, typer.Argument(help="comparison.json, or what eval --out wrote.")],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="File to make: .html, .md, .csv or .xml (JUnit)."),
    ] = Path("report.html"),
    force: ForceOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Make a report again from the JSON of a comparison."""
    from quantkit.cli.console import Console
    from quantkit.reports.files import read_comparison, render

    text = render(read_comparison(comparison), out)
    if out.exists() and not force:
        raise InputError("exists already", subject=str(out), fix="--force replaces it.")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    Console(as_json=as_json).show({"written": str(out)}, f"written: {out}")
