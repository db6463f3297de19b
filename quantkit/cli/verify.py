"""quantkit verify"""

from __future__ import annotations

from typing import Annotated

import typer

import quantkit
from quantkit.base.errors import ExitCode
from quantkit.cli.app import EXIT_CODES, app, handles_errors
from quantkit.cli.options import AdapterOpt, ArtifactArg, JsonOpt, parse_adapters


@app.command("verify", epilog=EXIT_CODES)
@handles_errors
def verify_command(
    artifact: ArtifactArg,
    baseline: Annotated[
        str | None,
        typer.Option(help="What it was made from: compares shapes, chat template and token ids."),
    ] = None,
    adapters: AdapterOpt = None,
    engine: Annotated[
        str | None,
        typer.Option(help="transformers, quantkit-int4, llama.cpp or vllm; what fits if unset."),
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Check that an artifact is whole and that an engine runs it."""
    from quantkit.cli.console import Console
    from quantkit.reports.findings import checks_table

    console = Console(as_json=as_json)
    result = quantkit.verify(
        artifact,
        baseline=baseline,
        adapters=parse_adapters(adapters),
        engine=engine,
        progress=console,
    )
    console.show(result.to_json(), checks_table(result))
    if not result.passed:
        raise typer.Exit(int(ExitCode.GATE_FAILED))
