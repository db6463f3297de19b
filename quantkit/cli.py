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
cache_app = typer.Typer(no_args_is_help=True, help="Statistics kept from earlier calibrations.")
app.add_typer(recipes_app, name="recipes")
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


@app.command("quantize", epilog=EXIT_CODES)
@_reported
def quantize_command(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a shipped one.")],
    model: ModelOpt,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Directory to make.")] = None,
    device: DeviceOpt = "auto",
    adapters: AdapterOpt = None,
    strict: StrictOpt = False,
    settings: SetOpt = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show schemes and sizes; write nothing.")
    ] = False,
    force: ForceOpt = False,
    memory_budget: BudgetOpt = None,
    cache: CacheOpt = True,
    no_fallback: Annotated[
        bool,
        typer.Option("--no-fallback", help="GGUF: refuse rows that the mix's type can't hold."),
    ] = False,
    pre_tokenizer: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="GGUF: llama.cpp's name of it, where none can be found."),
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Make an artifact from a checkpoint as a recipe says.

    A run that was stopped leaves its finished blocks in OUT.partial; the same command goes on
    from there.
    """
    from quantkit.console import Console
    from quantkit.quantize import prepare, quantize
    from quantkit.recipe import load_recipe
    from quantkit.reports.terminal import plan_table
    from quantkit.sizes import parse_size

    console = Console(as_json=as_json)
    settings = list(settings or [])
    settings += ["quantize.no_fallback=true"] if no_fallback else []
    settings += [f"quantize.pre_tokenizer={pre_tokenizer}"] if pre_tokenizer else []
    loaded = load_recipe(recipe, settings)
    job = prepare(loaded, model, [_weighted(a) for a in adapters or []], strict=strict)
    if dry_run:
        console.show(job.plan.to_json(), plan_table(job.plan, loaded.recipe.name))
        return
    if out is None:
        raise InputError("is needed", where="--out", mend="Name the directory to make.")
    manifest = quantize(
        job,
        out,
        device=device,
        force=force,
        progress=console,
        memory_budget=parse_size(memory_budget, "--memory-budget") if memory_budget else None,
        cache=cache,
    )
    bits = manifest["bits_per_weight"]
    part = f", {bits['quantized']:.3f} in the quantized part" if bits["quantized"] else ""
    console.show(
        manifest,
        f"{out}: {manifest['weights_bytes'] / 1e6:,.1f} MB, {bits['file']:.3f} bits a weight{part}",
    )


@app.command("sweep", epilog=EXIT_CODES)
@_reported
def sweep_command(
    recipes: Annotated[list[str], typer.Argument(help="Recipe files, or names of shipped ones.")],
    model: ModelOpt,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Directory for the artifacts and the comparison.")
    ],
    suite: Annotated[
        str | None, typer.Option(help="Judge them by this suite; sizes only if unset.")
    ] = None,
    device: DeviceOpt = "auto",
    adapters: AdapterOpt = None,
    strict: StrictOpt = False,
    settings: SetOpt = None,
    force: ForceOpt = False,
    memory_budget: BudgetOpt = None,
    cache: CacheOpt = True,
    bench: Annotated[bool, typer.Option(help="Measure cost too (with --suite).")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Make an artifact by each of many recipes, calibrating once, and compare them in a table.

    Artifacts that are there already, made of the same inputs, are kept.
    """
    from quantkit.compare import describe
    from quantkit.console import Console
    from quantkit.measure import Load
    from quantkit.quantize import made_already, prepare, quantize
    from quantkit.recipe import load_recipe, load_suite
    from quantkit.reports.terminal import models_table
    from quantkit.sizes import parse_size

    console = Console(as_json=as_json)
    loaded_suite = load_suite(suite) if suite else None
    budget = parse_size(memory_budget, "--memory-budget") if memory_budget else None
    pairs = [_weighted(a) for a in adapters or []]
    jobs = [prepare(load_recipe(r, settings), model, pairs, strict=strict) for r in recipes]
    names = [job.loaded.recipe.name for job in jobs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"is given twice: {', '.join(sorted(twice))}", where="RECIPE")
    artifacts = [out / name for name in names]
    # Gram matrices serve every method, so what measures them goes first.
    for job, place in sorted(zip(jobs, artifacts, strict=True), key=lambda item: item[0].demands):
        console.note(f"{job.loaded.recipe.name} → {place}")
        if made_already(job, place) and not force:
            console.note("made already, of the same inputs")
            continue
        quantize(
            job,
            place,
            device=device,
            force=force,
            progress=console,
            memory_budget=budget,
            cache=cache,
        )
    if loaded_suite is None:
        rows = [describe(path, None, None) for path in artifacts]
        console.show([row.to_json() for row in rows], models_table(rows, "Artifacts"))
        return
    load = Load(128, 32, 3, None, "cpu") if bench else None
    where = "cpu" if device == "auto" else device
    comparison = _judge(console, artifacts, (model, adapters), loaded_suite, where, load)
    _write_comparison(console, comparison, out)
    _finish(console, comparison, None)


@app.command("merge", epilog=EXIT_CODES)
@_reported
def merge_command(
    base: Annotated[str, typer.Argument(help="Checkpoint directory, hub id, or 'demo'.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to make.")],
    adapters: Annotated[
        list[str] | None, typer.Argument(metavar="ADAPTER...", help="LoRA directories or hub ids.")
    ] = None,
    weighted: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="ADAPTER=WEIGHT", help="One more, with its weight."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; the base's if unset.")
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Such as 2GB; the base's shards if unset.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings are errors.")] = False,
    proof: Annotated[
        bool, typer.Option(help="Compare the result with the adapter at run time.")
    ] = True,
    dequantize_base: Annotated[
        bool, typer.Option("--dequantize-base", help="Unpack a bitsandbytes base (QLoRA) first.")
    ] = False,
    force: ForceOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Merge LoRA adapters into a checkpoint, one tensor at a time, and prove it equal."""
    from quantkit.console import Console
    from quantkit.merge import merge

    console = Console(as_json=as_json)
    manifest = merge(
        base,
        [(adapter, 1.0) for adapter in adapters or []] + [_weighted(a) for a in weighted or []],
        out,
        dtype=dtype,
        max_shard_size=max_shard_size,
        strict=strict,
        proof=proof,
        dequantize_base=dequantize_base,
        force=force,
        progress=console,
    )
    text = f"{out}: {manifest['weights_bytes'] / 1e6:,.1f} MB"
    text += f", {manifest['changed_tensors']} tensors changed"
    if found := manifest["proof"]:
        text += f"; logits differ by {found['difference']:.1e} from base and adapter at run time"
        text += f", the cast to {manifest['dtype']} costs {found['kl']:.2g} nats (mean KL)"
    console.show(manifest, text)


@app.command("eval", epilog=EXIT_CODES)
@_reported
def eval_command(
    artifacts: ArtifactsArg,
    baseline: BaselineOpt,
    suite: SuiteOpt,
    adapters: AdapterOpt = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write JSON here.")] = None,
    device: DeviceOpt = "cpu",
    as_json: JsonOpt = False,
) -> None:
    """Judge artifacts by a suite, against the BF16 baseline."""
    from quantkit.console import Console
    from quantkit.recipe import load_suite

    console = Console(as_json=as_json)
    loaded = load_suite(suite)
    _finish(console, _judge(console, artifacts, (baseline, adapters), loaded, device), out)


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
    from quantkit.checkpoint.reader import Checkpoint
    from quantkit.checkpoint.source import locate
    from quantkit.checkpoint.writer import write_json
    from quantkit.compare import describe_costs
    from quantkit.console import Console
    from quantkit.measure import Load, measure
    from quantkit.reports.terminal import models_table

    console = Console(as_json=as_json)
    load = Load(prompt_tokens, new_tokens, repeats, threads, device)
    source = None if baseline is None else Checkpoint(locate(baseline))
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
    adapters: AdapterOpt = None,
    bench: Annotated[bool, typer.Option(help="Measure cost too.")] = True,
    prompt_tokens: PromptOpt = 128,
    new_tokens: NewOpt = 32,
    repeats: RepeatsOpt = 3,
    threads: ThreadsOpt = None,
    device: DeviceOpt = "cpu",
    as_json: JsonOpt = False,
) -> None:
    """Judge and measure artifacts: one table, a verdict, and the way back."""
    from quantkit.console import Console
    from quantkit.measure import Load
    from quantkit.recipe import load_suite

    console = Console(as_json=as_json)
    loaded = load_suite(suite)
    load = Load(prompt_tokens, new_tokens, repeats, threads, device) if bench else None
    comparison = _judge(console, artifacts, (baseline, adapters), loaded, device, load)
    _write_comparison(console, comparison, out)
    _finish(console, comparison, None)


@cache_app.command("list")
@_reported
def cache_list(as_json: JsonOpt = False) -> None:
    """Name what is kept, where, and how much room it takes."""
    from quantkit.calibration import cache
    from quantkit.console import Console
    from quantkit.reports.terminal import listing

    entries = cache.entries()
    values = [
        {"path": str(entry.path), "bytes": entry.nbytes, "about": entry.about} for entry in entries
    ]
    rows = [
        (
            entry.path.name[:12],
            f"{entry.nbytes / 1e6:,.1f}",
            entry.about.get("checkpoint", "")[:12],
            entry.about.get("calibration rows", "")[:12],
        )
        for entry in entries
    ]
    table = listing(("entry", "MB", "checkpoint", "calibration rows"), rows)
    table.title = f"{cache.directory()}, at most {cache.limit() / 1e9:g} GB"
    Console(as_json=as_json).show(values, table)


@cache_app.command("clear")
@_reported
def cache_clear(as_json: JsonOpt = False) -> None:
    """Remove everything that is kept."""
    from quantkit.calibration import cache
    from quantkit.console import Console

    freed = cache.clear()
    Console(as_json=as_json).show({"freed_bytes": freed}, f"{freed / 1e6:,.1f} MB freed")


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


def _weighted(text: str) -> tuple[str, float]:
    """ADAPTER=WEIGHT, or ADAPTER alone."""
    name, equals, weight = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        return name, float(weight)
    except ValueError:
        raise InputError(
            f"{weight} isn't a number", where=f"--adapter {text}", mend="Write --adapter DIR=0.7."
        ) from None


def _judge(
    console: Console,
    artifacts: list[Path],
    baseline: tuple[str, list[str] | None],
    suite: LoadedSuite,
    device: str,
    load: Load | None = None,
) -> Comparison:
    """Evaluate, measure where a load is given, and compare. ``baseline`` may have adapters."""
    from quantkit.checkpoint.reader import Checkpoint
    from quantkit.checkpoint.source import locate
    from quantkit.compare import check_gates, compare
    from quantkit.evaluate import evaluate
    from quantkit.measure import measure

    check_gates(suite.suite.gates)
    model, adapters = baseline
    source = Checkpoint(locate(model))
    if adapters:
        from quantkit.model.adapt import adapt

        source = adapt(source, [_weighted(adapter) for adapter in adapters], model)
    qualities = evaluate(artifacts, source, suite, device=device, progress=console)
    costs = None if load is None else measure(artifacts, source, load, console)
    return compare(source, artifacts, suite, qualities, costs)


def _write_comparison(console: Console, comparison: Comparison, out: Path) -> None:
    from quantkit.checkpoint.writer import write_json
    from quantkit.reports.markdown import comparison_markdown

    out.mkdir(parents=True, exist_ok=True)
    (out / "comparison.md").write_text(comparison_markdown(comparison), encoding="utf-8")
    write_json(out / "comparison.json", comparison.to_json())
    console.note(f"written: {out / 'comparison.md'}, {out / 'comparison.json'}")


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
