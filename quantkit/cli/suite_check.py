"""quantkit suite check"""

from __future__ import annotations

from typing import Annotated

import typer

import quantkit
from quantkit.base.errors import ExitCode
from quantkit.cli.app import EXIT_CODES, handles_errors, suite_app
from quantkit.cli.options import AllowCodeOpt, JsonOpt, SuiteArg


@suite_app.command("check", epilog=EXIT_CODES)
@handles_errors
def suite_check_command(
    suite: SuiteArg,
    recipes: Annotated[
        list[str] | None,
        typer.Option("--recipe", help="Look for its calibration text in the suite. Repeatable."),
    ] = None,
    allow_code: AllowCodeOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Validate a suite and all files that it names, without running a model."""
    from quantkit.cli.console import Console
    from quantkit.commands.suite_check import check_suite

    console = Console(as_json=as_json)
    report = check_suite(
        quantkit.load_suite(suite),
        [quantkit.load_recipe(name) for name in recipes or []],
        allow_code=allow_code,
    )
    lines = [*report.notes, *(f"problem: {problem}" for problem in report.problems)]
    outcome = f"{len(report.problems)} problems" if report.problems else "good"
    console.show(report.to_json(), "\n".join([*lines, f"{suite}: {outcome}"]))
    if report.problems:
        raise typer.Exit(int(ExitCode.BAD_INPUT))
