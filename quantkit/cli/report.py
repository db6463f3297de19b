"""quantkit report"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.app import EXIT_CODES, app, handles_errors
from quantkit.cli.options import ForceOpt, JsonOpt


@app.command("report", epilog=EXIT_CODES)
@handles_errors
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
    from quantkit.commands.report import report

    report(comparison, out, force=force)
    Console(as_json=as_json).show({"written": str(out)}, f"written: {out}")
