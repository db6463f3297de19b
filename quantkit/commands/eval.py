"""eval: artifacts judged by a suite, against their BF16 baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from quantkit.base.files import write_json
from quantkit.base.progress import Progress
from quantkit.checkpoint.reader import Checkpoint
from quantkit.commands.bench import measure_costs
from quantkit.judging.localize import localize
from quantkit.judging.quality import judge_quality
from quantkit.judging.variants import build_comparison
from quantkit.recipes.suite import LoadedSuite
from quantkit.results.comparison import Comparison, Variant
from quantkit.results.cost import Load
from quantkit.results.verdict import Verdict


@dataclass(frozen=True)
class JudgingOptions:
    """How artifacts are judged, where the suite leaves a choice.

    device: that quality is computed on; load: measure cost under it, None: don't; localize: find
    the layers that lose most, None: of artifacts that failed a gate; goal: what the artifacts are
    for, kept in the report; allow_code: run Python that the suite brings; allow_overlap: judge
    artifacts also on text that they were calibrated on.
    """

    device: str = "cpu"
    load: Load | None = None
    localize: bool | None = None
    goal: str | None = None
    allow_code: bool = False
    allow_overlap: bool = False

    def localizes(self, variant: Variant) -> bool:
        """Whether to find the layers at fault in an artifact with this verdict."""
        return variant.verdict is Verdict.FAIL if self.localize is None else self.localize


def evaluate(
    artifacts: Sequence[Path],
    baseline: Checkpoint,
    suite: LoadedSuite,
    options: JudgingOptions,
    *,
    model: str,
    progress: Progress,
) -> Comparison:
    """Judge artifacts by a suite, measure their cost under ``options.load``, and decide.

    model: the baseline's name as the user gave it.

    Raises QuantkitError, see ``judge_quality`` and ``measure_costs``.
    """
    qualities = judge_quality(
        artifacts,
        baseline,
        suite,
        device=options.device,
        progress=progress,
        allow_code=options.allow_code,
        allow_overlap=options.allow_overlap,
    )
    costs = None
    if options.load is not None:
        costs = measure_costs(artifacts, baseline, options.load, progress)
    comparison = build_comparison(
        baseline, artifacts, suite, qualities, costs, model=model, goal=options.goal
    )
    variants = tuple(
        replace(
            variant,
            localization=localize(
                variant, baseline, suite, device=options.device, progress=progress
            ),
        )
        if options.localizes(variant)
        else variant
        for variant in comparison.variants
    )
    return replace(comparison, variants=_with_patches_of_own_names(variants))


def _with_patches_of_own_names(variants: Sequence[Variant]) -> tuple[Variant, ...]:
    """The variants, where fixed recipes of one name that differ get the suffixes -2, -3 and so on.

    Each is written to a file of its name, and artifacts of one recipe may need different fixes.
    """
    known: dict[str, dict[str, Any]] = {}
    rows = []
    for variant in variants:
        patch = variant.localization.patch if variant.localization else None
        if variant.localization is not None and patch is not None:
            content, count = patch.recipe, 1
            while known.setdefault(content["name"], content) != content:
                count += 1
                content = {**content, "name": f"{patch.recipe['name']}-{count}"}
            renamed = replace(variant.localization, patch=replace(patch, recipe=content))
            variant = replace(variant, localization=renamed)
        rows.append(variant)
    return tuple(rows)


def write_evaluation(comparison: Comparison, out: Path, progress: Progress) -> None:
    """Write a comparison to ``out`` as JSON, and fixed recipes beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, comparison.to_json())
    write_fixed_recipes(comparison, out.parent, progress)


def write_fixed_recipes(comparison: Comparison, directory: Path, progress: Progress) -> None:
    """Write, for each artifact that failed, the recipe that would pass, as NAME-fixed.yaml."""
    for variant in comparison.variants:
        if variant.localization is not None and variant.localization.patch is not None:
            content = variant.localization.patch.recipe
            path = directory / f"{content['name']}.yaml"
            text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
            path.write_text(text, encoding="utf-8")
            progress.note(f"written: {path}, to quantize by instead of {variant.name}")
