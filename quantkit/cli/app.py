"""The application, and how a command that fails ends."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer

from quantkit.base.errors import CheckpointWarning, ExitCode, MachineError, QuantkitError
from quantkit.base.files import with_home
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
suite_app = typer.Typer(no_args_is_help=True, help="Make a suite of your own, and check it.")
cache_app = typer.Typer(no_args_is_help=True, help="Statistics kept from earlier calibrations.")
app.add_typer(recipes_app, name="recipes")
app.add_typer(suite_app, name="suite")
app.add_typer(cache_app, name="cache")


def handles_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Make a command end in a message and an exit code where it fails, with --json too."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        from quantkit.cli.console import Console

        as_json = bool(kwargs.get("as_json"))
        try:
            for name, value in kwargs.items():
                kwargs[name] = _with_home(value)
            with _shown_as_notes():
                command(*args, **kwargs)
        except QuantkitError as error:
            Console(as_json=as_json).error(error)
            raise typer.Exit(int(error.exit_code)) from None
        except KeyboardInterrupt:
            Console().note("interrupted")
            raise typer.Exit(int(ExitCode.INTERRUPTED)) from None
        except OSError as error:
            what = error.strerror or str(error) or type(error).__name__
            failure = MachineError(what, where=str(error.filename) if error.filename else None)
            Console(as_json=as_json).error(failure)
            raise typer.Exit(int(failure.exit_code)) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if type(error).__name__ == "OutOfMemoryError":  # torch's; this is no place to import it
                full = MachineError(
                    f"the GPU's memory is full: {str(error).split('. ')[0]}",
                    where="--device",
                    fix="Use --device cpu, or a GPU with more memory.",
                )
                Console(as_json=as_json).error(full)
                raise typer.Exit(int(full.exit_code)) from None
            import traceback

            Console().note(
                f"{traceback.format_exc()}\nThis is a bug in quantkit; please report it."
            )
            raise typer.Exit(int(ExitCode.BUG)) from None

    return run


@contextmanager
def _shown_as_notes() -> Iterator[None]:
    """Print our own warnings as sentences on stderr, without the line of code they come from."""
    from quantkit.cli.console import Console

    with warnings.catch_warnings():
        show = warnings.showwarning

        def note(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
            if issubclass(category, CheckpointWarning):
                Console().note(f"note: {message}")
            else:
                show(message, category, *rest, **more)

        warnings.showwarning = note
        yield


def _with_home(value: object) -> object:
    """An argument in which paths have ``~`` expanded."""
    if isinstance(value, list):
        return [_with_home(item) for item in value]
    return with_home(value) if isinstance(value, Path) else value


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
