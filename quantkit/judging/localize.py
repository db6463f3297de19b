"""Localization: where a judged artifact loses quality, and a recipe that fixes it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from quantkit.artifact.manifest import read_manifest, read_run
from quantkit.base import resources
from quantkit.base.errors import InputError
from quantkit.base.files import sha256
from quantkit.base.progress import Progress, Task
from quantkit.calibration.text import load_tokenizer
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.source import folder_name
from quantkit.formats.packed import open_artifact
from quantkit.judging.intervals import with_intervals
from quantkit.judging.likelihood import Divergence, held_out_rows
from quantkit.judging.places import Place
from quantkit.judging.restoring import Localizer
from quantkit.methods.registry import with_trait
from quantkit.model.device import resolve_device
from quantkit.model.limits import Limits
from quantkit.model.skeleton import Skeleton
from quantkit.plan.fix import fix
from quantkit.recipes.recipe import Recipe, recipe_from
from quantkit.recipes.suite import LoadedSuite
from quantkit.results.comparison import Variant
from quantkit.results.localization import Localization, Patch, PlaceLoss
from quantkit.results.manifest import MANIFEST, QuantizedManifest
from quantkit.results.metrics import KL_MEAN, LIKELIHOOD_METRICS
from quantkit.results.verdict import GateOutcome, Verdict

_TOKENS = 8192  # enough, since the artifact is compared with itself, changed in one place
_MEASURED = 5  # places whose loss is measured
_MARGIN = 1.1  # for a predicted KL divergence: the recipe will have 8 bits there, not 16

Figures = dict[str, float]  # metrics by their dotted names


def localize(
    variant: Variant, baseline: Checkpoint, loaded: LoadedSuite, *, device: str, progress: Progress
) -> Localization:
    """Find where a judged artifact loses quality, and fix its recipe if a gate failed.

    All places are ranked and the worst five measured, on the first rows of the suite's text, at
    most 8192 tokens. Raises InputError for an artifact that can't be read.
    """
    search = _Search(variant, baseline, loaded, device, progress)
    places = search.rank()
    worst = places[:_MEASURED]
    own, *alone = search.measure([[], *([place] for place in worst)], "places restored one by one")
    kl = [figures[KL_MEAN] for figures in alone]
    losses = tuple(
        PlaceLoss(place.modules, place.error, kl[rank] if rank < len(kl) else None)
        for rank, place in enumerate(places)
    )
    result = Localization(search.rows, own[KL_MEAN], losses)
    if variant.verdict is not Verdict.FAIL:
        return result
    manifest = read_manifest(Path(variant.path))
    if not isinstance(manifest, QuantizedManifest):
        return replace(result, no_patch="the artifact has no quantkit.json with its recipe")
    if not places:
        return replace(result, no_patch="its weights are the baseline's")
    # Places that were measured to gain come first, in order of their gain; then those that weren't
    # measured, in order of their error; last those that were measured to gain nothing.
    gains = sorted((k, rank) for rank, k in enumerate(kl) if k < result.kl_divergence)
    first = [worst[rank] for _, rank in gains]
    order = first + places[_MEASURED:] + [place for place in worst if place not in first]
    recipe = _recipe(manifest, Path(variant.path))
    best = alone[gains[0][1]] if gains else own
    return replace(result, **search.patch(recipe, order, max(len(first), 1), own, best))


class _Search:
    """The search for the places of one artifact, on the first rows of a suite's text."""

    def __init__(
        self,
        variant: Variant,
        baseline: Checkpoint,
        loaded: LoadedSuite,
        device: str,
        progress: Progress,
    ) -> None:
        self.variant, self.baseline, self.progress = variant, baseline, progress
        path = Path(variant.path)
        tokenizer = load_tokenizer(baseline.tokenizer)
        skeletons = Skeleton(baseline, torch.float32), Skeleton(baseline, torch.float32)
        rows = held_out_rows(loaded, Limits.of(skeletons[0], baseline), tokenizer).ids
        rows = rows[: max(2, _TOKENS // rows.shape[1])]
        self.rows = len(rows)
        artifact = open_artifact(path)
        with self._task("baseline", len(skeletons[0].layers)) as task:
            self._localizer = Localizer(
                skeletons,
                baseline,
                artifact,
                rows,
                resolve_device(device),
                rescaled=(variant.method or artifact.format) in with_trait("rescales"),
                step=task.advance,
            )

    def _task(self, what: str, steps: int) -> AbstractContextManager[Task]:
        return self.progress.task(f"localize {self.variant.name}: {what}", steps)

    def rank(self) -> list[Place]:
        """Every place, in order of falling error."""
        layers, _ = self._localizer.steps
        with self._task("rank", layers) as task:
            return self._localizer.rank(task.advance)

    def measure(self, trials: Sequence[Sequence[Place]], what: str) -> list[Figures]:
        """The artifact's figures with the places of each trial restored."""
        layers, heads = self._localizer.steps
        with self._task(what, layers + heads * len(trials)) as task:
            measured = self._localizer.measure(trials, task.advance)
        return [_figures(divergence) for divergence in measured]

    def patch(
        self, recipe: Recipe, order: list[Place], gaining: int, own: Figures, first: Figures
    ) -> dict[str, Any]:
        """The ``patch`` or ``no_patch`` of the result: the recipe with places of ``order`` fixed.

        It takes the fewest with which every likelihood gate is predicted to pass. gaining: how
        many at the beginning of ``order`` were measured to gain; own, first: the artifact's
        figures, and those with the first of ``order`` restored.
        """
        gates = [g for g in self.variant.gates if g.metric in own and g.value is not None]
        if all(gate.passed for gate in gates):
            (figures,) = self.measure([order[:gaining]], "places restored together")
            return self._patch(recipe, order[:gaining], self._predict(gates, own, figures), None)
        # After those that gain, half as many again each time, up to half of all places: a loss
        # that more than half of them share is better cured by another recipe.
        half = max(len(order) // 2, gaining)
        more = [int(gaining * 1.5**n) for n in range(1, 20)]
        more = [*(count for count in more if count < half), half]
        for counts in ([1], list(range(2, gaining + 1)), more):
            trials = [order[:count] for count in counts]
            measured = [first]
            if counts != [1]:
                measured = self.measure(trials, "places restored together")
            for places, figures in zip(trials, measured, strict=True):
                predicted = self._predict(gates, own, figures)
                if all(_would_pass(gate, predicted[gate.metric]) for gate in gates):
                    return self._patch(recipe, places, predicted, True)
        kl = predicted[KL_MEAN]
        return {
            "no_patch": f"the loss is spread: with the worst {half} of {len(order)} places in the "
            f"baseline's weights the KL divergence would be {kl:.5f}, and a gate would still fail; "
            "choose a recipe of more bits"
        }

    def _predict(self, gates: list[GateOutcome], own: Figures, restored: Figures) -> Figures:
        """What the suite would measure: its own figures, changed by the same factor as here."""
        quality = self.variant.quality
        values = {KL_MEAN: quality.metric(KL_MEAN) if quality else None}
        values |= {gate.metric: gate.value for gate in gates}
        return {
            name: value * restored[name] / own[name] if 0 < own[name] < math.inf else restored[name]
            for name, value in values.items()
            if value is not None
        }

    def _patch(
        self, recipe: Recipe, places: list[Place], predicted: Figures, fixes: bool | None
    ) -> dict[str, Any]:
        modules = [module for place in places for module in place.modules]
        skeleton = self._localizer.skeleton
        keys = [skeleton.key(name) for place in places for name in place.parameters]
        try:
            derived = fix(
                recipe, modules, keys, self.baseline, folder_name(self.baseline.directory)
            )
        except InputError as error:
            return {"no_patch": f"the recipe can't give these places more bits: {error}"}
        return {
            "patch": Patch(
                recipe=derived.content,
                changes=derived.changes,
                nbytes=derived.nbytes,
                added_bytes=derived.added_bytes,
                predicted=predicted,
                fixes=fixes,
            )
        }


def _figures(divergence: Divergence) -> Figures:
    """The likelihood metrics; infinite where they have no finite value."""
    quality = with_intervals(divergence.quality("float32"))
    values = {name: quality.metric(name) for name in LIKELIHOOD_METRICS}
    return {
        name: value if value is not None and math.isfinite(value) else math.inf
        for name, value in values.items()
    }


def _would_pass(gate: GateOutcome, value: float) -> bool:
    """Whether a figure would pass a gate, with an interval relatively as wide as the gate's."""
    low = high = value
    if gate.interval is not None and gate.value:
        low *= gate.interval.low / gate.value
        high *= gate.interval.high / gate.value
    if gate.metric.startswith("kl_divergence"):
        high *= _MARGIN
    return (gate.min is None or low >= gate.min) and (gate.max is None or high <= gate.max)


def _recipe(manifest: QuantizedManifest, artifact: Path) -> Recipe:
    """The recipe of an artifact, with the path of its calibration text on this machine."""
    content = manifest.recipe.content
    if manifest.calibration is not None and isinstance(content["calibration"]["dataset"], str):
        # The derived recipe will be written in another folder than the recipe that the path is
        # relative to, so it gets an absolute path; unless the text isn't found, or has changed.
        dataset, run = content["calibration"]["dataset"], read_run(artifact)
        folders = [resources.recipes(), Path.cwd()]
        if run is not None and run.recipe is not None:
            folders.insert(0, Path(run.recipe).parent)
        for file in ((folder / dataset).resolve() for folder in folders):
            if file.is_file() and sha256(file) == manifest.calibration.dataset_sha256:
                calibration = {**content["calibration"], "dataset": str(file)}
                content = {**content, "calibration": calibration}
                break
    return recipe_from(content, artifact / MANIFEST)
