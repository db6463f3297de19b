"""quantkit recipes check"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.base.errors import ExitCode
from quantkit.cli.app import EXIT_CODES, handles_errors, recipes_app
from quantkit.cli.options import JsonOpt


@recipes_app.command("check", epilog=EXIT_CODES)
@handles_errors
def recipes_check_command(
    folder: Annotated[
        Path | None, typer.Argument(help="Folder of recipes; the shipped ones if unset.")
    ] = None,
    lock: Annotated[Path | None, typer.Option(help="FOLDER/recipes.lock if unset.")] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Lock what is new; what is locked never changes.")
    ] = False,
    as_json: JsonOpt = False,
) -> None:
    """Compare recipes and suites with their lock: a published version never changes."""
    from quantkit.cli.console import Console
    from quantkit.commands.recipes_check import check_recipes
    from quantkit.reports.terminal import listing

    console = Console(as_json=as_json)
    report = check_recipes(folder, lock, write=write)
    if report.problems:
        rows = [(problem.where, problem.what, problem.fix) for problem in report.problems]
        console.show(report.to_json(), listing(("document", "problem", "fix"), rows))
        raise typer.Exit(int(ExitCode.GATE_FAILED))
    new = f", {len(report.new)} of them new" if report.new else ""
    console.show(report.to_json(), f"{report.lock}: {report.lines} lines hold{new}")
