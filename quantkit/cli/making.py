"""Commands that make something: quantize, sweep, merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.base.errors import InputError
from quantkit.cli.app import (
    EXIT_CODES,
    AdapterOpt,
    AllowCodeOpt,
    AllowOverlapOpt,
    BudgetOpt,
    CacheOpt,
    DeviceOpt,
    ForceOpt,
    GoalOpt,
    JsonOpt,
    LocateOpt,
    ModelOpt,
    SetOpt,
    StrictOpt,
    app,
    reported,
    with_weight,
)
from quantkit.cli.verdict import finish, judge, write_comparison


@app.command("quantize", epilog=EXIT_CODES)
@reported
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
    from quantkit.base.sizes import parse_size
    from quantkit.cli.console import Console
    from quantkit.commands.quantize import prepare, quantize
    from quantkit.recipes.recipe import load_recipe
    from quantkit.reports.terminal import plan_table

    console = Console(as_json=as_json)
    settings = list(settings or [])
    settings += ["quantize.no_fallback=true"] if no_fallback else []
    settings += [f"quantize.pre_tokenizer={pre_tokenizer}"] if pre_tokenizer else []
    loaded = load_recipe(recipe, settings)
    job = prepare(loaded, model, [with_weight(a) for a in adapters or []], strict=strict)
    if dry_run:
        console.show(job.plan.to_json(), plan_table(job.plan, loaded.recipe.name))
        return
    if out is None:
        raise InputError("is required", subject="--out", fix="Name the directory to make.")
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
@reported
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
    locate: LocateOpt = None,
    allow_code: AllowCodeOpt = False,
    allow_overlap: AllowOverlapOpt = False,
    goal: GoalOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Make an artifact by each of many recipes, calibrating once, and compare them in a table.

    Artifacts that are there already, made of the same inputs, are kept.
    """
    from quantkit.base.sizes import parse_size
    from quantkit.cli.console import Console
    from quantkit.commands.bench import Load
    from quantkit.commands.compare import describe
    from quantkit.commands.quantize import made_already, prepare, quantize
    from quantkit.recipes.recipe import load_recipe
    from quantkit.recipes.suite import load_suite
    from quantkit.reports.terminal import models_table

    console = Console(as_json=as_json)
    loaded_suite = load_suite(suite) if suite else None
    budget = parse_size(memory_budget, "--memory-budget") if memory_budget else None
    pairs = [with_weight(a) for a in adapters or []]
    jobs = [prepare(load_recipe(r, settings), model, pairs, strict=strict) for r in recipes]
    names = [job.loaded.recipe.name for job in jobs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"is given twice: {', '.join(sorted(twice))}", subject="RECIPE")
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
    comparison = judge(
        console,
        artifacts,
        (model, adapters),
        loaded_suite,
        where,
        load=load,
        locating=locate,
        goal=goal,
        allow_code=allow_code,
        allow_overlap=allow_overlap,
    )
    write_comparison(console, comparison, out)
    finish(console, comparison, None)


@app.command("merge", epilog=EXIT_CODES)
@reported
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
    from quantkit.cli.console import Console
    from quantkit.commands.merge import merge

    console = Console(as_json=as_json)
    manifest = merge(
        base,
        [(adapter, 1.0) for adapter in adapters or []] + [with_weight(a) for a in weighted or []],
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
