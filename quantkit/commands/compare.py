"""compare: qualities and costs → one table, gates, a verdict for each row and over all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantkit.artifact.manifest import occasion, read_manifest, read_run
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.packed import open_artifact
from quantkit.judging.case_inputs import case_inputs
from quantkit.judging.gates import hold
from quantkit.recipes.suite import Gate, LoadedSuite
from quantkit.results.comparison import CaseInput, Comparison, Variant
from quantkit.results.cost import Cost, Costs
from quantkit.results.quality import Qualities, Quality
from quantkit.results.verdict import Verdict

_ROUND_INPUTS = ("smoothquant", "fp8")  # methods


def describe(path: Path, quality: Quality | None, cost: Cost | None) -> Variant:
    """A row for what lies at ``path``: an artifact of ours or another's, or a plain checkpoint."""
    manifest: dict[str, Any] = read_manifest(path) or {}
    recipe = manifest.get("recipe", {})
    source = open_artifact(path)
    disk_bytes = sum(file.stat().st_size for file in source.files)
    return Variant(
        name=recipe.get("name", path.name),
        path=str(path),
        recipe=f"{recipe['name']} {recipe['version']}" if recipe else None,
        method=manifest.get("method"),
        format=source.format,
        bits_per_weight=8 * disk_bytes / source.parameters(),
        disk_bytes=disk_bytes,
        quality=quality,
        cost=cost,
        manifest=manifest or None,
        run=read_run(path),
    )


def decide(variant: Variant, gates: Sequence[Gate]) -> Variant:
    """Hold a variant's quality against the gates."""
    if not gates:
        return variant
    outcomes = tuple(hold(gate, variant.quality) for gate in gates)
    return replace(
        variant, gates=outcomes, verdict=Verdict.over(outcome.verdict for outcome in outcomes)
    )


def compare(
    baseline: Checkpoint,
    artifacts: Sequence[Path],
    loaded: LoadedSuite,
    qualities: Qualities,
    costs: Costs | None,
    *,
    model: str | None = None,
    goal: str | None = None,
) -> Comparison:
    """Judge the artifacts by the suite's gates and say what differs between the rows.

    model: the baseline as it was named; goal: what the artifacts are for.
    """
    gates = loaded.suite.gates
    base = describe(baseline.directory, qualities.baseline, costs.baseline if costs else None)
    dtype = _dtype_name(baseline)
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
        decide(describe(path, quality, costs.artifacts[index] if costs else None), gates)
        for index, (path, quality) in enumerate(zip(artifacts, qualities.artifacts, strict=True))
    )
    if len({variant.name for variant in variants}) < len(variants):
        variants = tuple(replace(v, name=Path(v.path).name) for v in variants)
    verdict = Verdict.over(v.verdict for v in variants if v.verdict) if gates else None
    return Comparison(
        suite=f"{loaded.suite.name} {loaded.suite.version}",
        baseline=base,
        references=tuple(references),
        variants=variants,
        differences=(*_differences(base, references, variants), *qualities.remarks),
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
) -> list[Variant]:
    """Rows of costs alone."""
    rows = []
    if baseline is not None:
        base = describe(baseline.directory, None, costs.baseline)
        base = replace(base, name=_dtype_name(baseline))
        rows.append(base)
        if costs.baseline_gguf is not None:
            rows.append(_as_gguf(base, costs.baseline_gguf))
    for path, cost in zip(artifacts, costs.artifacts, strict=True):
        rows.append(describe(path, None, cost))
    return rows


def _as_gguf(base: Variant, cost: Cost) -> Variant:
    """The baseline in llama.cpp: what GGUF artifacts' costs are to be held against."""
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


def _dtype_name(baseline: Checkpoint) -> str:
    config = baseline.config
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return {"bfloat16": "BF16", "float16": "FP16", "float32": "FP32"}.get(dtype, dtype)


def _differences(
    base: Variant, references: Sequence[Variant], variants: Sequence[Variant]
) -> list[str]:
    """What isn't the same on both sides."""
    said = []
    for variant in variants:
        what = "the weights"
        if variant.method in _ROUND_INPUTS:
            what = "the weights and the inputs of linears"
        if base.cost is None or variant.cost is None or variant.cost.engine == base.cost.engine:
            said.append(f"{variant.name}: {what} only ({variant.format}).")
            continue
        engine = variant.cost.engine
        same = [row.name for row in references if row.cost and row.cost.engine == engine]
        against = f"; for the weights alone compare with {same[0]}" if same else ""
        said.append(
            f"{variant.name}: {what} ({variant.format}); for cost the engine too ({engine}, "
            f"not {base.cost.engine}), so its speed isn't the quantization's alone{against}."
        )
    return said
