"""The rows of a comparison: what each model is, what the gates decide, and what differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from quantkit.artifact.machine import occasion
from quantkit.artifact.manifest import read_manifest, read_run
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.packed import open_artifact
from quantkit.judging.cases import case_inputs
from quantkit.judging.gates import apply_gate
from quantkit.judging.naming import artifact_name, dtype_label, named_artifacts
from quantkit.methods.registry import with_trait
from quantkit.recipes.suite import Gate, LoadedSuite
from quantkit.results.comparison import CaseInput, Comparison, Variant
from quantkit.results.cost import Cost, Costs
from quantkit.results.manifest import QuantizedManifest
from quantkit.results.quality import Qualities, Quality
from quantkit.results.verdict import Verdict


def describe_artifact(
    path: Path,
    quality: Quality | None = None,
    cost: Cost | None = None,
    *,
    name: str | None = None,
) -> Variant:
    """The row of an artifact, ours or another tool's, or of a plain checkpoint.

    name: the row's; the artifact's own if None.
    """
    manifest = read_manifest(path)
    recipe = manifest.recipe if isinstance(manifest, QuantizedManifest) else None
    source = open_artifact(path)
    disk_bytes = sum(file.stat().st_size for file in source.files)
    return Variant(
        name=artifact_name(path) if name is None else name,
        path=str(path),
        recipe=f"{recipe.name} {recipe.version}" if recipe else None,
        method=manifest.method if manifest else None,
        format=source.format,
        bits_per_weight=8 * disk_bytes / source.parameters(),
        disk_bytes=disk_bytes,
        quality=quality,
        cost=cost,
        manifest=manifest,
        run=read_run(path),
    )


def apply_gates(variant: Variant, gates: Sequence[Gate]) -> Variant:
    """The row with the outcome of each gate and, where there are gates, its verdict."""
    if not gates:
        return variant
    outcomes = tuple(apply_gate(gate, variant.quality) for gate in gates)
    return replace(
        variant, gates=outcomes, verdict=Verdict.over(outcome.verdict for outcome in outcomes)
    )


def build_comparison(
    baseline: Checkpoint,
    artifacts: Sequence[Path],
    loaded: LoadedSuite,
    qualities: Qualities,
    costs: Costs | None,
    *,
    model: str | None = None,
    goal: str | None = None,
) -> Comparison:
    """Put qualities and costs into one table, with the verdicts of the suite's gates.

    model: the baseline's name as the user gave it; goal: what the artifacts are for.
    """
    gates = loaded.suite.gates
    measured = [None] * len(artifacts) if costs is None else costs.artifacts
    base = describe_artifact(
        baseline.directory, qualities.baseline, None if costs is None else costs.baseline
    )
    dtype = dtype_label(baseline)
    adapted = qualities.base is not None
    base = replace(base, name=f"{dtype} + adapter" if adapted else dtype)
    floor = replace(base, name=f"{dtype} vs FP32", quality=qualities.noise_floor, cost=None)
    references = [floor]
    if adapted:
        plain = replace(base, name=f"{dtype} base", quality=qualities.base, cost=None)
        references.append(plain)
    if costs is not None and costs.baseline_gguf is not None:
        references.append(_as_gguf(replace(base, name=dtype), costs.baseline_gguf))
    variants = tuple(
        apply_gates(describe_artifact(path, quality, cost, name=name), gates)
        for (name, path), quality, cost in zip(
            named_artifacts(artifacts, baseline).items(), qualities.artifacts, measured, strict=True
        )
    )
    verdict = Verdict.over(v.verdict for v in variants if v.verdict) if gates else None
    return Comparison(
        suite=f"{loaded.suite.name} {loaded.suite.version}",
        baseline=base,
        references=tuple(references),
        variants=variants,
        differences=(*differences(base, references, variants), *qualities.remarks),
        way_back=f"serve the baseline again: {base.path}{' with its adapter' if adapted else ''} "
        f"({base.disk_bytes / 1e6:.1f} MB, unchanged by any of this).",
        verdict=verdict,
        goal=goal,
        cases=_case_inputs(loaded),
        occasion=occasion(model or str(baseline.directory), loaded.suite.digest),
    )


def _case_inputs(loaded: LoadedSuite) -> tuple[CaseInput, ...]:
    regression = loaded.suite.regression
    if regression is None:
        return ()
    return case_inputs(loaded.resolve(regression.cases))


def describe_costs(
    baseline: Checkpoint | None, artifacts: Sequence[Path], costs: Costs
) -> tuple[Variant, ...]:
    """The rows of a benchmark: the baseline where it was measured, then the artifacts."""
    rows = []
    if baseline is not None:
        base = describe_artifact(baseline.directory, cost=costs.baseline)
        base = replace(base, name=dtype_label(baseline))
        rows.append(base)
        if costs.baseline_gguf is not None:
            rows.append(_as_gguf(base, costs.baseline_gguf))
    named = named_artifacts(artifacts, baseline)
    for (name, path), cost in zip(named.items(), costs.artifacts, strict=True):
        rows.append(describe_artifact(path, cost=cost, name=name))
    return tuple(rows)


def _as_gguf(base: Variant, cost: Cost) -> Variant:
    """The baseline in llama.cpp, whose cost is what a GGUF artifact's is compared with."""
    size = cost.weights_bytes or base.disk_bytes
    weights = 8 * base.disk_bytes / base.bits_per_weight
    return replace(
        base,
        name=f"{base.name} GGUF",
        format="gguf",
        quality=None,
        cost=cost,
        disk_bytes=size,
        bits_per_weight=8 * size / weights,
    )


def differences(
    base: Variant, references: Sequence[Variant], variants: Sequence[Variant]
) -> list[str]:
    """A sentence for each variant that names all in which it differs from the baseline."""
    sentences = []
    for variant in variants:
        what = "the weights"
        if variant.method in with_trait("rounds_inputs"):
            what = "the weights and the inputs of linears"
        if base.cost is None or variant.cost is None or variant.cost.engine == base.cost.engine:
            sentences.append(f"{variant.name}: {what} only ({variant.format}).")
            continue
        engine = variant.cost.engine
        same = [row.name for row in references if row.cost and row.cost.engine == engine]
        against = f"; for the weights alone compare with {same[0]}" if same else ""
        sentences.append(
            f"{variant.name}: {what} ({variant.format}); for cost the engine too ({engine}, "
            f"not {base.cost.engine}), so its speed isn't the quantization's alone{against}."
        )
    return sentences
