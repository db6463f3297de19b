"""The commands: parse, call verbs, print. Heavy imports live inside the commands that need them."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from quantkit import __version__
from quantkit.errors import ExitCode, InputError, MachineError, QuantkitError

if TYPE_CHECKING:
    from quantkit.console import Console
    from quantkit.measure import Load
    from quantkit.recipe import LoadedSuite
    from quantkit.results import Comparison

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
app.add_typer(recipes_app, name="recipes")

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
ArtifactsArg = Annotated[list[Path], typer.Argument(help="Artifact directories.")]
SuiteOpt = Annotated[str, typer.Option(help="Suite file, or the name of a shipped one.")]
BaselineOpt = Annotated[str, typer.Option(help="BF16 checkpoint directory, hub id, or 'demo'.")]
PromptOpt = Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")]
NewOpt = Annotated[int, typer.Option(min=2, help="Tokens generated.")]
RepeatsOpt = Annotated[int, typer.Option(min=1, help="Timed runs; the median counts.")]
ThreadsOpt = Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores if unset.")]


def _reported(command: Callable[P, None]) -> Callable[P, None]:
    """Turn expected failures into a message and an exit code, in this one place."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        from quantkit.console import Console

        as_json = bool(kwargs.get("as_json"))
        try:
            command(*args, **kwargs)
        except QuantkitError as error:
            Console(as_json=as_json).error(error)
            raise typer.Exit(int(error.exit_code)) from None
        except KeyboardInterrupt:
            Console().note("interrupted; nothing half-written was left behind")
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


@app.command("quantize", epilog=EXIT_CODES)
@_reported
def quantize_command(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a shipped one.")],
    model: ModelOpt,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Directory to make.")] = None,
    device: DeviceOpt = "auto",
    settings: SetOpt = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show schemes and sizes; write nothing.")
    ] = False,
    force: ForceOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Make an artifact from a checkpoint as a recipe says."""
    from quantkit.console import Console
    from quantkit.quantize import prepare, quantize
    from quantkit.recipe import load_recipe
    from quantkit.reports.terminal import plan_table

    console = Console(as_json=as_json)
    loaded = load_recipe(recipe, settings)
    job = prepare(loaded, model)
    if dry_run:
        console.show(job.plan.to_json(), plan_table(job.plan, loaded.recipe.name))
        return
    if out is None:
        raise InputError("is needed", where="--out", mend="Name the directory to make.")
    manifest = quantize(job, out, device=device, force=force, progress=console)
    bits = manifest["bits_per_weight"]
    part = f", {bits['quantized']:.3f} in the quantized part" if bits["quantized"] else ""
    console.show(
        manifest,
        f"{out}: {manifest['weights_bytes'] / 1e6:,.1f} MB, {bits['file']:.3f} bits a weight{part}",
    )


@app.command("eval", epilog=EXIT_CODES)
@_reported
def eval_command(
    artifacts: ArtifactsArg,
    baseline: BaselineOpt,
    suite: SuiteOpt,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write JSON here.")] = None,
    device: DeviceOpt = "cpu",
    as_json: JsonOpt = False,
) -> None:
    """Judge artifacts by a suite, against the BF16 baseline."""
    from quantkit.console import Console
    from quantkit.recipe import load_suite

    console = Console(as_json=as_json)
    loaded = load_suite(suite)
    _finish(console, _judge(console, artifacts, baseline, loaded, device), out)


@app.command("bench", epilog=EXIT_CODES)
@_reported
def bench_command(
    artifacts: ArtifactsArg,
    baseline: Annotated[
        str | None, typer.Option(help="BF16 checkpoint to measure beside them.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write JSON here.")] = None,
    prompt_tokens: PromptOpt = 128,
    new_tokens: NewOpt = 32,
    repeats: RepeatsOpt = 3,
    threads: ThreadsOpt = None,
    device: DeviceOpt = "cpu",
    as_json: JsonOpt = False,
) -> None:
    """Measure memory, latency and throughput, each artifact in a fresh process."""
    from quantkit.checkpoint.source import locate
    from quantkit.checkpoint.writer import write_json
    from quantkit.compare import describe_costs
    from quantkit.console import Console
    from quantkit.measure import Load, measure
    from quantkit.reports.terminal import models_table

    console = Console(as_json=as_json)
    load = Load(prompt_tokens, new_tokens, repeats, threads, device)
    source = None if baseline is None else locate(baseline)
    costs = measure(artifacts, source, load, console)
    rows = describe_costs(source, artifacts, costs)
    values = [row.to_json() for row in rows]
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, values)
    console.show(values, models_table(rows, "Cost"))


@app.command("compare", epilog=EXIT_CODES)
@_reported
def compare_command(
    artifacts: ArtifactsArg,
    baseline: BaselineOpt,
    suite: SuiteOpt,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Directory for comparison.md and comparison.json.")
    ],
    bench: Annotated[bool, typer.Option(help="Measure cost too.")] = True,
    prompt_tokens: PromptOpt = 128,
    new_tokens: NewOpt = 32,
    repeats: RepeatsOpt = 3,
    threads: ThreadsOpt = None,
    device: DeviceOpt = "cpu",
    as_json: JsonOpt = False,
) -> None:
    """Judge and measure artifacts: one table, a verdict, and the way back."""
    from quantkit.checkpoint.writer import write_json
    from quantkit.console import Console
    from quantkit.measure import Load
    from quantkit.recipe import load_suite
    from quantkit.reports.markdown import comparison_markdown

    console = Console(as_json=as_json)
    loaded = load_suite(suite)
    load = Load(prompt_tokens, new_tokens, repeats, threads, device) if bench else None
    comparison = _judge(console, artifacts, baseline, loaded, device, load)
    out.mkdir(parents=True, exist_ok=True)
    (out / "comparison.md").write_text(comparison_markdown(comparison), encoding="utf-8")
    write_json(out / "comparison.json", comparison.to_json())
    console.note(f"written: {out / 'comparison.md'}, {out / 'comparison.json'}")
    _finish(console, comparison, None)


@recipes_app.command("list")
@_reported
def recipes_list(as_json: JsonOpt = False) -> None:
    """Name the shipped recipes."""
    from quantkit.console import Console
    from quantkit.recipe import shipped_recipes
    from quantkit.reports.terminal import listing

    recipes = [loaded.recipe for loaded in shipped_recipes()]
    rows = [(r.name, r.version, r.digest[:12], r.description) for r in recipes]
    keys = ("name", "version", "digest", "description")
    values = [{key: getattr(recipe, key) for key in keys} for recipe in recipes]
    Console(as_json=as_json).show(values, listing(keys, rows))


@recipes_app.command("show")
@_reported
def recipes_show(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a shipped one.")],
    settings: SetOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Show a recipe with every default written out, and its digest."""
    import yaml

    from quantkit.console import Console
    from quantkit.recipe import load_recipe

    loaded = load_recipe(recipe, settings).recipe
    content: dict[str, Any] = loaded.model_dump(mode="json", by_alias=True)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    Console(as_json=as_json).show(
        {**content, "digest": loaded.digest}, f"{text}# digest: {loaded.digest}"
    )


def _judge(
    console: Console,
    artifacts: list[Path],
    baseline: str,
    suite: LoadedSuite,
    device: str,
    load: Load | None = None,
) -> Comparison:
    """Evaluate, measure where a load is given, and compare."""
    from quantkit.checkpoint.source import locate
    from quantkit.compare import check_gates, compare
    from quantkit.evaluate import evaluate
    from quantkit.measure import measure

    check_gates(suite.suite.gates)
    source = locate(baseline)
    qualities = evaluate(artifacts, source, suite, device=device, progress=console)
    costs = None if load is None else measure(artifacts, source, load, console)
    return compare(source, artifacts, suite, qualities, costs)


def _finish(console: Console, comparison: Comparison, out: Path | None) -> None:
    """Print a comparison and leave with the code of its verdict."""
    from quantkit.checkpoint.writer import write_json
    from quantkit.reports.cells import notes
    from quantkit.reports.terminal import comparison_table
    from quantkit.results import Verdict

    value = comparison.to_json()
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, value)
    console.show(value, comparison_table(comparison))
    for note in notes(comparison):
        console.note(note)
    codes = {Verdict.FAIL: ExitCode.GATE_FAILED, Verdict.INCONCLUSIVE: ExitCode.INCONCLUSIVE}
    if comparison.verdict in codes:
        raise typer.Exit(int(codes[comparison.verdict]))


def main() -> None:
    """Run the command line. Being told to end is the same as Ctrl-C: clean up, then go."""
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    app()


if __name__ == "__main__":
    main()
