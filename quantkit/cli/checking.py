"""Commands that look at an artifact: inspect, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.base.errors import ExitCode
from quantkit.cli.app import EXIT_CODES, AdapterOpt, JsonOpt, app, reported, with_weight

ArtifactArg = Annotated[Path, typer.Argument(help="Directory or .gguf file, anyone's.")]


@app.command("inspect", epilog=EXIT_CODES)
@reported
def inspect_command(artifact: ArtifactArg, as_json: JsonOpt = False) -> None:
    """Say what an artifact is: format, schemes, size, producer, tokenizer, what loads it."""
    from quantkit.cli.console import Console
    from quantkit.commands.inspect import examine
    from quantkit.reports.findings import facts_table

    console = Console(as_json=as_json)
    facts = examine(artifact)
    console.show(facts.to_json(), facts_table(facts))


@app.command("verify", epilog=EXIT_CODES)
@reported
def verify_command(
    artifact: ArtifactArg,
    baseline: Annotated[
        str | None,
        typer.Option(help="What it was made of: compares shapes, chat template and token ids."),
    ] = None,
    adapters: AdapterOpt = None,
    engine: Annotated[
        str | None,
        typer.Option(help="transformers, quantkit-int4, llama.cpp or vllm; what fits if unset."),
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Check that an artifact is whole and that an engine runs it."""
    from quantkit.checkpoint.reader import Checkpoint
    from quantkit.checkpoint.source import locate
    from quantkit.cli.console import Console
    from quantkit.commands.verify import verify
    from quantkit.reports.findings import checks_table

    console = Console(as_json=as_json)
    source = None if baseline is None else Checkpoint(locate(baseline))
    if source is not None and baseline is not None and adapters:
        from quantkit.lora.open import adapt

        source = adapt(source, [with_weight(adapter) for adapter in adapters], baseline)
    result = verify(artifact, source, engine, console)
    console.show(result.to_json(), checks_table(result))
    if not result.passed:
        raise typer.Exit(int(ExitCode.GATE_FAILED))
