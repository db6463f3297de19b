"""Commands for suites of one's own: suite init, suite check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.base.errors import ExitCode
from quantkit.cli.app import (
    EXIT_CODES,
    AdapterOpt,
    AllowCodeOpt,
    BaselineOpt,
    DeviceOpt,
    ForceOpt,
    JsonOpt,
    reported,
    suite_app,
    with_weight,
)


@suite_app.command("init", epilog=EXIT_CODES)
@reported
def suite_init(
    prompts: Annotated[
        Path, typer.Argument(help="A prompt a line, or a .jsonl file of prompts or messages.")
    ],
    baseline: BaselineOpt,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to make.")],
    name: Annotated[str | None, typer.Option(help="The suite's name; OUT's if unset.")] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Held-out text for likelihoods; the prompts and answers if unset."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Limit of an answer.")] = 64,
    adapters: AdapterOpt = None,
    device: DeviceOpt = "cpu",
    force: ForceOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Write a suite to start from: the baseline's answers to your prompts, as regression cases."""
    import re

    from quantkit.checkpoint.reader import Checkpoint
    from quantkit.checkpoint.source import locate
    from quantkit.cli.console import Console
    from quantkit.commands.suite_init import record
    from quantkit.lora.open import adapt

    console = Console(as_json=as_json)
    source = Checkpoint(locate(baseline))
    if adapters:
        source = adapt(source, [with_weight(adapter) for adapter in adapters], baseline)
    called = re.sub(r"[^a-z0-9._+-]+", "-", (name or out.resolve().name).lower()).strip("-._+")
    made = record(
        prompts,
        source,
        out,
        name=called or "suite",
        text=text,
        max_new_tokens=max_new_tokens,
        device=device,
        force=force,
        progress=console,
    )
    checks = ", ".join(f"{count} {check}" for check, count in made.checks.items())
    said = f"{made.suite}: {made.cases} cases ({checks}). Read them, then: quantkit suite check"
    if made.cut:
        console.note(
            f"{len(made.cut)} answers were cut at the limit of tokens: {', '.join(made.cut[:5])}"
        )
    value = {"suite": str(made.suite), "cases": made.cases, "checks": made.checks, "cut": made.cut}
    console.show(value, f"{said} {made.suite}")


@suite_app.command("check", epilog=EXIT_CODES)
@reported
def suite_check(
    suite: Annotated[str, typer.Argument(help="Suite file, or the name of a shipped one.")],
    recipes: Annotated[
        list[str] | None,
        typer.Option("--recipe", help="Look for its calibration text in the suite. Repeatable."),
    ] = None,
    allow_code: AllowCodeOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Validate a suite and all that it names, without running a model."""
    from quantkit.cli.console import Console
    from quantkit.commands.suite_check import check
    from quantkit.recipes.recipe import load_recipe
    from quantkit.recipes.suite import load_suite

    console = Console(as_json=as_json)
    loaded = load_suite(suite)
    found = check(loaded, [load_recipe(name) for name in recipes or []], allow_code=allow_code)
    lines = [*found.notes, *(f"problem: {problem}" for problem in found.problems)]
    lines.append(f"{suite}: {len(found.problems)} problems" if found.problems else f"{suite}: good")
    console.show({"problems": found.problems, "notes": found.notes}, "\n".join(lines))
    if found.problems:
        raise typer.Exit(int(ExitCode.BAD_INPUT))
