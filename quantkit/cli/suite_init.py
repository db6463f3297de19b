"""quantkit suite init"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.app import EXIT_CODES, handles_errors, suite_app
from quantkit.cli.options import (
    AdapterOpt,
    BaselineOpt,
    DeviceOpt,
    ForceOpt,
    JsonOpt,
    parse_adapters,
)

_SHOWN = 5


@suite_app.command("init", epilog=EXIT_CODES)
@handles_errors
def suite_init_command(
    prompts: Annotated[
        Path,
        typer.Argument(help="A prompt a line, or JSON, CSV or Parquet with prompts or messages."),
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
    from quantkit.cli.console import Console
    from quantkit.commands.suite_init import init_suite
    from quantkit.lora.open import open_checkpoint

    console = Console(as_json=as_json)
    suite = init_suite(
        prompts,
        open_checkpoint(baseline, parse_adapters(adapters)),
        out,
        name=name,
        text=text,
        max_new_tokens=max_new_tokens,
        device=device,
        force=force,
        progress=console,
    )
    if suite.cut:
        first = ", ".join(suite.cut[:_SHOWN])
        console.note(f"{len(suite.cut)} answers were cut at the limit of tokens: {first}")
    checks = ", ".join(f"{count} {check}" for check, count in suite.checks.items())
    console.show(
        suite.to_json(),
        f"{suite.path}: {suite.cases} cases ({checks}). "
        f"Read them, then: quantkit suite check {suite.path}",
    )
