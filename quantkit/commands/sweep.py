"""sweep: many recipes on one model, calibrated once, compared in one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantkit.base.errors import InputError
from quantkit.base.output import check_folder
from quantkit.base.progress import Progress
from quantkit.commands.compare import compare
from quantkit.commands.eval import JudgingOptions
from quantkit.commands.quantize import check_artifact_output, made_already, prepare, quantize
from quantkit.judging.variants import describe_artifact
from quantkit.lora.open import Weighted, open_baseline
from quantkit.recipes.recipe import LoadedRecipe
from quantkit.recipes.suite import LoadedSuite
from quantkit.results.sweep import Sweep


def sweep(
    recipes: Sequence[LoadedRecipe],
    model: str,
    out: Path,
    *,
    adapters: Sequence[Weighted] = (),
    strict: bool = False,
    text_only: bool = False,
    device: str,
    force: bool,
    memory_budget: int | None = None,
    cache: bool = True,
    resume: bool = True,
    suite: LoadedSuite | None = None,
    options: JudgingOptions,
    progress: Progress,
) -> Sweep:
    """Make an artifact by each recipe in ``out``/NAME, then judge all of them by the suite, if any.

    An artifact that is there already, made from the same inputs, is kept unless ``force``. The
    other arguments are those of ``prepare``, ``quantize`` and ``compare``.

    Raises QuantkitError. Every job is checked before the first one starts; artifacts that were
    finished before the error stay.
    """
    jobs = [
        prepare(recipe, model, adapters, strict=strict, text_only=text_only, device=device)
        for recipe in recipes
    ]
    names = [job.loaded.recipe.name for job in jobs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"is given twice: {', '.join(sorted(twice))}", subject="RECIPE")
    artifacts = [out / name for name in names]
    if suite is not None:
        check_folder(out)
    pairs = list(zip(jobs, artifacts, strict=True))
    made = {path for job, path in pairs if not force and made_already(job, path)}
    for job, path in pairs:
        if path not in made:
            check_artifact_output(job, path, force=force)
    # A Gram matrix holds the diagonal that other methods need, but not the other way round: what
    # needs most is made first, and all others find their statistics in the cache.
    for job, path in sorted(pairs, key=lambda pair: pair[0].demands):
        progress.note(f"{job.loaded.recipe.name} → {path}")
        if path in made:
            progress.note("made already, from the same inputs")
            continue
        quantize(
            job,
            path,
            device=device,
            force=force,
            progress=progress,
            memory_budget=memory_budget,
            cache=cache,
            resume=resume,
        )
    if suite is None:
        return Sweep(tuple(describe_artifact(path) for path in artifacts))
    comparison = compare(
        artifacts,
        open_baseline(model, adapters, artifacts),
        suite,
        options,
        out=out,
        model=model,
        progress=progress,
    )
    return Sweep(comparison.variants, comparison)
