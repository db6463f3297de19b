"""quantkit quantize"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import quantkit
from quantkit.base.errors import InputError
from quantkit.cli.app import EXIT_CODES, app, handles_errors
from quantkit.cli.options import (
    AdapterOpt,
    BudgetOpt,
    CacheOpt,
    DevicesOpt,
    ForceOpt,
    JsonOpt,
    ModelOpt,
    RecipeArg,
    ResumeOpt,
    SetOpt,
    StrictOpt,
    TextOnlyOpt,
    parse_adapters,
    parse_optional_size,
)


@app.command("quantize", epilog=EXIT_CODES)
@handles_errors
def quantize_command(
    recipe: RecipeArg,
    model: ModelOpt,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Directory to make.")] = None,
    device: DevicesOpt = "auto",
    adapters: AdapterOpt = None,
    strict: StrictOpt = False,
    text_only: TextOnlyOpt = False,
    settings: SetOpt = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show schemes and sizes; write nothing.")
    ] = False,
    force: ForceOpt = False,
    memory_budget: BudgetOpt = None,
    cache: CacheOpt = True,
    resume: ResumeOpt = True,
    no_fallback: Annotated[
        bool,
        typer.Option("--no-fallback", help="GGUF: refuse rows that the mix's type can't hold."),
    ] = False,
    pre_tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="GGUF: llama.cpp's name for it, where it isn't recognized."
        ),
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Make an artifact from a checkpoint as a recipe says.

    A run that was stopped leaves its finished blocks in OUT.partial; the same command continues
    from there.
    """
    from quantkit.cli.console import Console
    from quantkit.reports.terminal import plan_table

    console = Console(as_json=as_json)
    settings = list(settings or [])
    settings += ["quantize.no_fallback=true"] if no_fallback else []
    settings += [f"quantize.pre_tokenizer={pre_tokenizer}"] if pre_tokenizer else []
    loaded = quantkit.load_recipe(recipe, settings)
    pairs = parse_adapters(adapters)
    if dry_run:
        plan = quantkit.dry_run(
            loaded, model=model, adapters=pairs, strict=strict, text_only=text_only
        )
        console.show(plan.to_json(), plan_table(plan, loaded.recipe.name))
        for note in plan.notes:
            console.note(note)
        return
    if out is None:
        raise InputError("is required", subject="--out", fix="Name the directory to make.")
    manifest = quantkit.quantize(
        loaded,
        model=model,
        out=out,
        adapters=pairs,
        strict=strict,
        text_only=text_only,
        device=device,
        force=force,
        memory_budget=parse_optional_size(memory_budget, "--memory-budget"),
        cache=cache,
        resume=resume,
        progress=console,
    )
    bits = manifest.bits_per_weight
    part = f", {bits.quantized:.3f} in the quantized part" if bits.quantized else ""
    console.show(
        manifest.to_json(),
        f"{out}: {manifest.weights_bytes / 1e6:,.1f} MB, {bits.file:.3f} bits a weight{part}",
    )
