"""The Python API: each function does what the command of its name does.

A model, a baseline or an adapter is named by its directory, by its hub id (``owner/name``, or
``owner/name@revision``) or as 'demo', which ships with quantkit. A recipe or a suite is a file, the
name of a shipped one, or what ``load_recipe`` or ``load_suite`` returned. Long work reports to
``progress``, an object with the methods of ``quantkit.base.progress.Progress``; without one it is
silent. Every function raises ``InputError`` for bad input, ``MachineError`` where the machine
lacks something (an engine, a package, memory, disk space, a device), and ``QuantkitError``, which
both of them are, where the work itself fails. An output that exists is replaced only with
``force=True``, and only where quantkit made it.
"""

# Every function imports what it needs: `import quantkit`, and with it `quantkit --help`, must not
# take the seconds that torch and transformers take to load.
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from quantkit.base.files import paths, with_home
from quantkit.base.output import check_file
from quantkit.base.progress import Progress, Silent
from quantkit.results.cost import Load

if TYPE_CHECKING:
    from quantkit.artifact.findings import Facts, Verification
    from quantkit.plan.base import Plan
    from quantkit.recipes.recipe import LoadedRecipe
    from quantkit.recipes.suite import LoadedSuite
    from quantkit.results.comparison import Comparison, Variant
    from quantkit.results.manifest import MergedManifest, QuantizedManifest
    from quantkit.results.sweep import Sweep

AnyPath: TypeAlias = str | Path
AnyRecipe: TypeAlias = "str | Path | LoadedRecipe"
AnySuite: TypeAlias = "str | Path | LoadedSuite"
AnyAdapter: TypeAlias = str | Path | tuple[str | Path, float]  # with its weight, 1.0 if none
Artifacts: TypeAlias = str | Path | Sequence[str | Path]

DEFAULT_LOAD = Load()


def load_recipe(recipe: AnyPath, settings: Sequence[str] = ()) -> LoadedRecipe:
    """Load a recipe, a YAML file or a shipped name, and validate every key.

    ``settings`` are changes such as "quantize.bits=8": a dotted key and a YAML value. They make a
    derived recipe, named NAME+set, with a digest of its own. Returns the recipe and the file that
    its paths are relative to.
    """
    from quantkit.recipes.recipe import load_recipe

    return load_recipe(str(recipe), list(settings))


def load_suite(suite: AnyPath) -> LoadedSuite:
    """Load a suite, a YAML file or a shipped name, and validate every key.

    Returns the suite and the file that its paths are relative to.
    """
    from quantkit.recipes.suite import load_suite

    return load_suite(str(suite))


def quantize(
    recipe: AnyRecipe,
    *,
    model: AnyPath,
    out: AnyPath,
    adapters: Sequence[AnyAdapter] = (),
    strict: bool = False,
    text_only: bool = False,
    device: str = "auto",
    force: bool = False,
    memory_budget: int | None = None,
    cache: bool = True,
    resume: bool = True,
    progress: Progress | None = None,
) -> QuantizedManifest:
    """Make an artifact from a checkpoint, as a recipe says.

    A run that was stopped leaves its finished blocks in OUT.partial, and the same call continues
    from there. Returns the artifact's manifest, as in its quantkit.json.

    Args:
        model: the BF16 checkpoint.
        out: the directory to make. It appears whole or not at all.
        adapters: LoRA adapters to fold in, each alone or with its weight: ("my-lora", 0.7).
        strict: treat warnings about adapters as errors.
        text_only: leave out what is for images and sound.
        device: "auto", "cpu", "cuda", "cuda:N", or several CUDA devices, as in "cuda:0,1".
        force: replace an artifact that is there.
        memory_budget: bytes of hidden states in memory, and as many of matrices of experts.
        cache: use the statistics of earlier calibrations, and keep this one's.
        resume: keep hidden states on disk, so that a stopped call needn't calibrate again.
    """
    from quantkit.commands.quantize import prepare, quantize

    what = (_recipe(recipe), str(model), _weighted(adapters))
    job = prepare(*what, strict=strict, text_only=text_only, device=device)
    return quantize(
        job,
        with_home(out),
        device=device,
        force=force,
        progress=progress or Silent(),
        memory_budget=memory_budget,
        cache=cache,
        resume=resume,
    )


def dry_run(
    recipe: AnyRecipe,
    *,
    model: AnyPath,
    adapters: Sequence[AnyAdapter] = (),
    strict: bool = False,
    text_only: bool = False,
) -> Plan:
    """Plan what ``quantize`` would make of the same arguments, and refuse what it would refuse.

    Returns every tensor of the artifact with its scheme and size. Nothing is written.
    """
    from quantkit.commands.quantize import prepare

    what = (_recipe(recipe), str(model), _weighted(adapters))
    return prepare(*what, strict=strict, text_only=text_only).plan


def sweep(
    recipes: Sequence[AnyRecipe],
    *,
    model: AnyPath,
    out: AnyPath,
    suite: AnySuite | None = None,
    adapters: Sequence[AnyAdapter] = (),
    strict: bool = False,
    text_only: bool = False,
    device: str = "auto",
    force: bool = False,
    memory_budget: int | None = None,
    cache: bool = True,
    resume: bool = True,
    load: Load | None = None,
    localize: bool | None = None,
    goal: str | None = None,
    allow_code: bool = False,
    allow_overlap: bool = False,
    progress: Progress | None = None,
) -> Sweep:
    """Make an artifact by each of many recipes, calibrating once, and compare them.

    Keeps artifacts of the same inputs. Returns a row for each and, with a suite, the comparison.

    Args:
        recipes: what to make, each with a name of its own.
        model: the BF16 checkpoint, with ``adapters`` also the baseline.
        out: the directory for the artifacts (OUT/NAME) and, with a suite, the report.
        suite: how to judge the artifacts; they are only made if None.
        adapters, strict, text_only … resume: as for ``quantize``.
        load, localize, goal, allow_code, allow_overlap: as for ``compare``; no cost without a load.
    """
    from quantkit.commands.eval import JudgingOptions
    from quantkit.commands.sweep import sweep

    # Quality is computed on the CPU unless a device is named, so that figures compare.
    judged_on = "cpu" if device == "auto" else device.partition(",")[0]
    options = JudgingOptions(judged_on, load, localize, goal, allow_code, allow_overlap)
    return sweep(
        [_recipe(recipe) for recipe in recipes],
        str(model),
        with_home(out),
        adapters=_weighted(adapters),
        strict=strict,
        text_only=text_only,
        device=device,
        force=force,
        memory_budget=memory_budget,
        cache=cache,
        resume=resume,
        suite=None if suite is None else _suite(suite),
        options=options,
        progress=progress or Silent(),
    )


def merge(
    base: AnyPath,
    adapters: Sequence[AnyAdapter],
    *,
    out: AnyPath,
    dtype: str | None = None,
    max_shard_size: int | None = None,
    strict: bool = False,
    proof: bool = True,
    dequantize_base: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> MergedManifest:
    """Merge LoRA adapters into a checkpoint, one tensor at a time, and prove it equal.

    Returns the manifest of the merged checkpoint ``base``, as in its quantkit.json.

    Args:
        adapters: what to merge, each alone or with its weight: ("my-lora", 0.7).
        out: the directory to make. It appears whole or not at all.
        dtype: "float32", "float16" or "bfloat16"; the base's if None.
        max_shard_size: bytes; shards as large as the base's if None.
        strict: treat warnings as errors.
        proof: compare the result's logits with those of base and adapter at run time.
        dequantize_base: unpack a bitsandbytes base (QLoRA) first.
        force: replace a merged checkpoint that is there.
    """
    from quantkit.commands.merge import merge

    return merge(
        str(base),
        _weighted(adapters),
        with_home(out),
        dtype=dtype,
        max_shard_size=max_shard_size,
        strict=strict,
        proof=proof,
        dequantize_base=dequantize_base,
        force=force,
        progress=progress or Silent(),
    )


def evaluate(
    artifacts: Artifacts,
    *,
    baseline: AnyPath,
    suite: AnySuite,
    adapters: Sequence[AnyAdapter] = (),
    out: AnyPath | None = None,
    device: str = "cpu",
    localize: bool | None = None,
    goal: str | None = None,
    allow_code: bool = False,
    allow_overlap: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Judge artifacts by a suite, against the BF16 baseline. This is the command ``eval``.

    Returns every figure, gate and verdict; the verdict is None for a suite without gates.

    Args:
        artifacts: one directory or .gguf file, or several, of any tool.
        baseline, suite: the checkpoint that they were made from, and how to judge them.
        adapters: LoRA adapters of the baseline.
        out: a file for the result as JSON. Recipes that fix what failed are written beside it.
        device: "auto", "cpu", "cuda" or "cuda:N".
        localize: find the layers that lose most; only in artifacts that failed a gate if None.
        goal: what the artifacts are for; kept in the result.
        allow_code, allow_overlap: run Python of the suite's; judge on calibration text too.
    """
    from quantkit.commands.eval import JudgingOptions, evaluate, write_evaluation
    from quantkit.lora.open import open_baseline

    if out is not None:
        check_file(with_home(out))
    options = JudgingOptions(device, None, localize, goal, allow_code, allow_overlap)
    progress = progress or Silent()
    comparison = evaluate(
        paths(artifacts),
        open_baseline(str(baseline), _weighted(adapters), paths(artifacts)),
        _suite(suite),
        options,
        model=str(baseline),
        progress=progress,
    )
    if out is not None:
        write_evaluation(comparison, with_home(out), progress)
    return comparison


def bench(
    artifacts: Artifacts,
    *,
    baseline: AnyPath | None = None,
    load: Load = DEFAULT_LOAD,
    out: AnyPath | None = None,
    progress: Progress | None = None,
) -> tuple[Variant, ...]:
    """Measure memory, latency and throughput, each artifact in a fresh process.

    Returns a row for each artifact with its ``cost``. The baseline's come first: the checkpoint
    itself and, where an artifact is GGUF, its BF16 GGUF. A figure that an engine can't give is
    None, and ``cost.missing`` has the reason.

    Args:
        artifacts: one directory or .gguf file, or several, of any tool.
        baseline: a BF16 checkpoint to measure beside them.
        load: what every engine is asked to do.
        out: a file for the result as JSON.
    """
    from quantkit.commands.bench import bench, write_rows
    from quantkit.lora.open import open_baseline

    if out is not None:
        check_file(with_home(out))
    source = None if baseline is None else open_baseline(str(baseline), (), paths(artifacts))
    rows = bench(paths(artifacts), source, load, progress or Silent())
    if out is not None:
        write_rows(rows, with_home(out))
    return rows


def compare(
    artifacts: Artifacts,
    *,
    baseline: AnyPath,
    suite: AnySuite,
    adapters: Sequence[AnyAdapter] = (),
    out: AnyPath | None = None,
    device: str = "cpu",
    load: Load | None = DEFAULT_LOAD,
    localize: bool | None = None,
    goal: str | None = None,
    allow_code: bool = False,
    allow_overlap: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Judge and measure artifacts: one table, a verdict, and the way back to the baseline.

    Returns every figure, gate and verdict; the verdict is None for a suite without gates.

    Args:
        artifacts: one directory or .gguf file, or several, of any tool.
        baseline, suite, adapters, localize, goal, allow_code, allow_overlap: as for ``evaluate``.
        out: a directory for the report and its data, and recipes that fix what failed.
        device: that quality is computed on. ``load`` has the one that cost is measured on.
        load: what every engine is asked to do; None: cost isn't measured.
    """
    from quantkit.commands.compare import compare
    from quantkit.commands.eval import JudgingOptions
    from quantkit.lora.open import open_baseline

    options = JudgingOptions(device, load, localize, goal, allow_code, allow_overlap)
    return compare(
        paths(artifacts),
        open_baseline(str(baseline), _weighted(adapters), paths(artifacts)),
        _suite(suite),
        options,
        out=None if out is None else with_home(out),
        model=str(baseline),
        progress=progress or Silent(),
    )


def inspect(artifact: AnyPath) -> Facts:
    """Describe an artifact, a directory or a .gguf file of any tool, without running it.

    Returns its format, schemes, sizes, producer and tokenizer, and which engines load it.
    """
    from quantkit.commands.inspect import inspect

    return inspect(with_home(artifact))


def verify(
    artifact: AnyPath,
    *,
    baseline: AnyPath | None = None,
    adapters: Sequence[AnyAdapter] = (),
    engine: str | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Check that an artifact is whole and that an engine runs it.

    Returns every check; ``verification.passed`` is False if one of them failed.

    Args:
        artifact: a directory or a .gguf file, of any tool.
        baseline: what it was made from, to compare shapes, chat template and token ids.
        adapters: LoRA adapters of the baseline.
        engine: "transformers", "quantkit-int4", "llama.cpp" or "vllm"; the usual one if None.
    """
    from quantkit.commands.verify import verify
    from quantkit.lora.open import open_baseline

    path, pairs = with_home(artifact), _weighted(adapters)
    source = None if baseline is None else open_baseline(str(baseline), pairs, [path])
    return verify(path, source, engine, progress or Silent())


def _recipe(recipe: AnyRecipe) -> LoadedRecipe:
    return load_recipe(recipe) if isinstance(recipe, str | Path) else recipe


def _suite(suite: AnySuite) -> LoadedSuite:
    return load_suite(suite) if isinstance(suite, str | Path) else suite


def _weighted(adapters: Sequence[AnyAdapter]) -> list[tuple[str, float]]:
    pairs = [adapter if isinstance(adapter, tuple) else (adapter, 1.0) for adapter in adapters]
    return [(str(name), weight) for name, weight in pairs]
