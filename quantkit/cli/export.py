"""quantkit export"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.app import EXIT_CODES, app, handles_errors
from quantkit.cli.options import ForceOpt, JsonOpt


class Target(StrEnum):
    """What an artifact can be exported to."""

    OLLAMA = "ollama"


@app.command("export", epilog=EXIT_CODES)
@handles_errors
def export_command(
    artifact: Annotated[Path, typer.Argument(help="Directory of a GGUF artifact.")],
    to: Annotated[Target, typer.Option("--to", help="Program that will run it.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Directory to write into; ARTIFACT-ollama if unset."),
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT|FILE", help="System prompt, or a file with one.")
    ] = None,
    parameters: Annotated[
        list[str] | None,
        typer.Option("--parameter", metavar="NAME=VALUE", help="Such as temperature=0.7."),
    ] = None,
    template: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A Go template to use instead of the translated one."),
    ] = None,
    force: ForceOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Write a Modelfile, with the model's chat template in Ollama's language.

    The translation is proven to write the same text as the chat template before it is written.
    """
    from quantkit.cli.console import Console
    from quantkit.commands.export import export_ollama

    console = Console(as_json=as_json)
    result = export_ollama(
        artifact,
        out,
        template=template,
        system=system,
        parameters=parameters or [],
        force=force,
    )
    for note in result.notes:
        console.note(f"note: {note}")
    console.show(result.to_json(), f"{result.path}: in its directory, ollama create NAME")
