"""The application, the options that commands share, and what becomes of an error."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ParamSpec

import typer

from quantkit.base.errors import ExitCode, InputError, MachineError, QuantkitError
from quantkit.base.version import __version__

P = ParamSpec("P")

EXIT_CODES = (
    "Exit codes: 0 done, every gate passed · 1 a gate failed · 2 bad input · 3 the machine lacks "
    "something · 4 inconclusive · 70 a bug of ours · 130 interrupted."
)

app = typer.Typer(
    name="quantkit",
    help="From a BF16 language model to a quantized release you can defend.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(no_args_is_help=True, help="The recipes that ship with quantkit.")
cache_app = typer.Typer(no_args_is_help=True, help="Statistics kept from earlier calibrations.")
suite_app = typer.Typer(no_args_is_help=True, help="Make a suite of your own, and check it.")
app.add_typer(recipes_app, name="recipes")
app.add_typer(suite_app, name="suite")
app.add_typer(cache_app, name="cache")

ModelOpt = Annotated[
    str, typer.Option("--model", "-m", help="Checkpoint directory, hub id, or 'demo'.")
]
DeviceOpt = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
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
        help="Memory that calibration's hidden states may take, such as 2GB, before they wait on "
        "disk; half of what is free if unset.",
    ),
]
CacheOpt = Annotated[
    bool, typer.Option(help="Reuse the statistics of earlier calibrations, and keep this one's.")
]
StrictOpt = Annotated[bool, typer.Option("--strict", help="Warnings about adapters are errors.")]
ArtifactsArg = Annotated[list[Path], typer.Argument(help="Artifact directories.")]
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


def reported(command: Callable[P, None]) -> Callable[P, None]:
    """Turn expected failures into a message and an exit code, in this one place."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        from quantkit.cli.console import Console

        as_json = bool(kwargs.get("as_json"))
        try:
            command(*args, **kwargs)
        except QuantkitError as error:
            Console(as_json=as_json).error(error)
            raise typer.Exit(int(error.exit_code)) from None
        except KeyboardInterrupt:
            Console().note("interrupted")
            raise typer.Exit(int(ExitCode.INTERRUPTED)) from None
        except OSError as error:
            what = error.strerror or str(error)
            failure = MachineError(what, where=str(error.filename or "a file"))
            Console(as_json=as_json).error(failure)
            raise typer.Exit(int(failure.exit_code)) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception:
            import traceback

            Console().note(
                f"{traceback.format_exc()}\nThis is a bug in quantkit; please report it."
            )
            raise typer.Exit(int(ExitCode.BUG)) from None

    return run


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def with_weight(text: str) -> tuple[str, float]:
    """ADAPTER=WEIGHT, or ADAPTER alone."""
    name, equals, weight = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        return name, float(weight)
    except ValueError:
        raise InputError(
            f"{weight} isn't a number", where=f"--adapter {text}", fix="Write --adapter DIR=0.7."
        ) from None
