"""The arguments and options that commands share, and how their texts are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from quantkit.base.errors import InputError
from quantkit.base.sizes import parse_size

RecipeArg = Annotated[str, typer.Argument(help="Recipe file, or the name of a shipped one.")]
SuiteArg = Annotated[str, typer.Argument(help="Suite file, or the name of a shipped one.")]
ArtifactArg = Annotated[
    Path, typer.Argument(help="Directory or .gguf file, of quantkit or another tool.")
]
ArtifactsArg = Annotated[list[Path], typer.Argument(help="Artifact directories.")]

ModelOpt = Annotated[
    str, typer.Option("--model", "-m", help="Checkpoint directory, hub id, or 'demo'.")
]
OutFileOpt = Annotated[Path | None, typer.Option("--out", "-o", help="Also write JSON here.")]
DeviceOpt = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DevicesOpt = Annotated[
    str,
    typer.Option(
        "--device",
        help="auto, cpu, cuda, cuda:N, or cuda:0,1,… to spread calibration rows over several.",
    ),
]
ForceOpt = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout, no table.")]
SetOpt = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key; makes a derived recipe."),
]
AdapterOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter", metavar="ADAPTER[=WEIGHT]", help="LoRA directory, hub id or 'demo' to fold in."
    ),
]
BudgetOpt = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory for calibration's hidden states, such as 2GB; the rest goes to disk. As much "
        "again for the matrices of a layer's experts, which are measured in groups beyond it. Half "
        "of what is free if unset.",
    ),
]
CacheOpt = Annotated[
    bool, typer.Option(help="Reuse the statistics of earlier calibrations, and keep this one's.")
]
ResumeOpt = Annotated[
    bool,
    typer.Option(
        "--resume/--no-resume",
        help="Keep calibration's hidden states in OUT.partial, for a stopped run to go on from: "
        "after each block on a CPU, now and then on a GPU.",
    ),
]
StrictOpt = Annotated[bool, typer.Option("--strict", help="Warnings about adapters are errors.")]
TextOnlyOpt = Annotated[
    bool,
    typer.Option("--text-only", help="Leave out what is for images and sound: the text model."),
]
AllowCodeOpt = Annotated[
    bool, typer.Option("--allow-code", help="Run the Python that the suite brings. Read it first.")
]
AllowOverlapOpt = Annotated[
    bool,
    typer.Option(
        "--allow-overlap", help="Judge artifacts also on text that they were calibrated on."
    ),
]
SuiteOpt = Annotated[str, typer.Option(help="Suite file, or the name of a shipped one.")]
BaselineOpt = Annotated[str, typer.Option(help="BF16 checkpoint directory, hub id, or 'demo'.")]
GoalOpt = Annotated[
    str | None, typer.Option(metavar="TEXT", help="What the artifacts are for; kept in the report.")
]
LocateOpt = Annotated[
    bool | None,
    typer.Option(
        "--locate/--no-locate",
        help="Measure which layers lose most, and fix the recipe; where a gate failed if unset.",
    ),
]
PromptOpt = Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")]
NewOpt = Annotated[int, typer.Option(min=2, help="Tokens generated.")]
RepeatsOpt = Annotated[int, typer.Option(min=1, help="Timed runs; the median counts.")]
ThreadsOpt = Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores if unset.")]


def parse_adapters(texts: Sequence[str] | None) -> list[tuple[str, float]]:
    """Adapters and their weights, each written ADAPTER=WEIGHT, or ADAPTER for a weight of 1."""
    return [_parse_adapter(text) for text in texts or ()]


def _parse_adapter(text: str) -> tuple[str, float]:
    name, equals, weight = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        return name, float(weight)
    except ValueError:
        raise InputError(
            f"{weight} isn't a number", where=f"--adapter {text}", fix="Write --adapter DIR=0.7."
        ) from None


def parse_optional_size(text: str | None, option: str) -> int | None:
    """Bytes of a size such as 2GB; None where the option isn't given."""
    return None if text is None else parse_size(text, option)
