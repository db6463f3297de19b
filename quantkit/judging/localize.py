"""locate: judged artifact × suite → where it loses quality, and a recipe that fixes it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantkit.artifact.manifest import read_manifest
from quantkit.base import resources
from quantkit.base.errors import InputError
from quantkit.base.files import read_optional_json, sha256
from quantkit.base.progress import Progress
from quantkit.calibration.text import load_tokenizer
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.packed import open_artifact
from quantkit.judging.held_out import held_out_rows
from quantkit.judging.likelihood import Divergence
from quantkit.judging.places import Localiser, Place
from quantkit.lora.open import tokenizer_directory
from quantkit.model.device import resolve_device
from quantkit.model.skeleton import Skeleton
from quantkit.plan.fix import fix
from quantkit.recipes.recipe import Recipe, recipe_from
from quantkit.recipes.suite import LoadedSuite
from quantkit.results.comparison import Variant
from quantkit.results.localization import Localisation, Patch, PlaceLoss
from quantkit.results.manifest import MANIFEST, RUN
from quantkit.results.metrics import METRICS
from quantkit.results.quality import Quality
from quantkit.results.verdict import GateOutcome, Verdict

_TOKENS = 8192  # enough to compare the artifact with itself, changed in one place
_MEASURED = 5
_MARGIN = 1.1  # of the KL divergence: eight bits aren't quite the baseline's weights

Figures = dict[str, float]  # metrics by their dotted names


def locate(
    variant: Variant, baseline: Checkpoint, loaded: LoadedSuite, *, device: str, progress: Progress
) -> Localisation:
    """Rank the places of a judged artifact, measure the worst, and fix the recipe if it failed.

    Measured on the first rows of the suite's text, at most 8192 tokens. Raises InputError.
    """
    search = _Search(variant, baseline, loaded, device, progress)
    places = search.rank()
    worst = places[:_MEASURED]
    own, *alone = search.measure([[], *([place] for place in worst)], "put back one by one")
    kl = [found["kl_divergence.mean"] for found in alone]
    losses = tuple(
        PlaceLoss(place.modules, place.error, kl[rank] if rank < len(kl) else None)
        for rank, place in enumerate(places)
    )
    result = Localisation(search.rows, own["kl_divergence.mean"], losses)
    if variant.verdict is not Verdict.FAIL:
        return result
    manifest = read_manifest(Path(variant.path))
    if manifest is None or "recipe" not in manifest:
        return replace(result, no_patch="it has no quantkit.json that says its recipe")
    if not places:
        return replace(result, no_patch="its weights are the baseline's")
    # What pays most comes first, then what wasn't tried, then what pays nothing.
    pays = sorted((k, rank) for rank, k in enumerate(kl) if k < result.kl_divergence)
    first = [worst[rank] for _, rank in pays]
    order = first + places[_MEASURED:] + [place for place in worst if place not in first]
    recipe = _recipe(manifest, Path(variant.path))
    best = alone[pays[0][1]] if pays else own
    return replace(result, **search.fixed(recipe, order, max(len(first), 1), own, best))


class _Search:
    """An artifact beside its baseline on the first rows of a suite."""

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
        tokenizer = load_tokenizer(tokenizer_directory(baseline))
        rows = held_out_rows(loaded, baseline, tokenizer)
        rows = rows[: max(2, _TOKENS // rows.shape[1])]
        self.rows = len(rows)
        skeletons = Skeleton(baseline, torch.float32), Skeleton(baseline, torch.float32)
        artifact = open_artifact(path)
        with progress.task(f"locate {variant.name}: baseline", len(skeletons[0].layers)) as task:
            self._localiser = Localiser(
                skeletons,
                baseline,
                artifact,
                rows,
                resolve_device(device),
                rescaled=(variant.method or artifact.format) in ("awq", "smoothquant"),
                step=task.advance,
            )

    def rank(self) -> list[Place]:
        """Every place, the greatest predicted error first."""
        layers, _ = self._localiser.steps
        with self.progress.task(f"locate {self.variant.name}: rank", layers) as task:
            return self._localiser.rank(task.advance)

    def measure(self, trials: Sequence[Sequence[Place]], what: str) -> list[Figures]:
        """The artifact's figures with each trial's places put back."""
        layers, heads = self._localiser.steps
        steps = layers + heads * len(trials)
        with self.progress.task(f"locate {self.variant.name}: {what}", steps) as task:
            found = self._localiser.measure(trials, partial(task.advance, doing=what))
        return [_figures(divergence) for divergence in found]

    def fixed(
        self, recipe: Recipe, order: list[Place], paying: int, own: Figures, first: Figures
    ) -> dict[str, Any]:
        """The recipe with the fewest places of ``order`` fixed by which all gates would hold.

        Where it takes more than the ``paying`` ones, half as many again are tried, up to half of
        all: what takes more is no matter of places. own, first: figures of the artifact, and
        with the first place put back.
        """
        gates = [g for g in self.variant.gates if g.metric in own and g.value is not None]
        if all(gate.passed for gate in gates):
            (found,) = self.measure([order[:paying]], "put back together")
            return self._patch(recipe, order[:paying], self._predict(gates, own, found), None)
        half = max(len(order) // 2, paying)
        more = [int(paying * 1.5**n) for n in range(1, 20)]
        more = [*(count for count in more if count < half), half]
        for counts in ([1], list(range(2, paying + 1)), more):
            trials = [order[:count] for count in counts]
            measured = [first] if counts == [1] else self.measure(trials, "put back together")
            for places, figures in zip(trials, measured, strict=True):
                predicted = self._predict(gates, own, figures)
                if all(_would_hold(gate, predicted[gate.metric]) for gate in gates):
                    return self._patch(recipe, places, predicted, True)
        kl = predicted["kl_divergence.mean"]
        return {
            "no_patch": f"the loss is spread: with the worst {half} of {len(order)} places in the "
            f"baseline's weights the KL divergence would be {kl:.5f}, and a gate would still fail; "
            "choose a recipe of more bits"
        }

    def _predict(self, gates: list[GateOutcome], own: Figures, found: Figures) -> Figures:
        """What the suite would measure: the change on the rows in hand, carried over to all."""
        quality = self.variant.quality
        values = {"kl_divergence.mean": quality.metric("kl_divergence.mean") if quality else None}
        values |= {gate.metric: gate.value for gate in gates}
        return {
            name: value * found[name] / own[name] if 0 < own[name] < math.inf else found[name]
            for name, value in values.items()
            if value is not None
        }

    def _patch(
        self, recipe: Recipe, places: list[Place], predicted: Figures, fixes: bool | None
    ) -> dict[str, Any]:
        modules = [module for place in places for module in place.modules]
        skeleton = self._localiser.skeleton
        keys = [skeleton.key(name) for place in places for name in place.parameters]
        try:
            found = fix(recipe, modules, keys, self.baseline, self.baseline.directory.name)
        except InputError as error:
            return {"no_patch": f"the recipe can't hold one: {error}"}
        return {
            "patch": Patch(
                found.content, found.changes, found.nbytes, found.added_bytes, predicted, fixes
            )
        }


def _figures(divergence: Divergence) -> Figures:
    """The metrics that need no answers; infinite where they aren't finite."""
    perplexity, kl = divergence.perplexity(), divergence.kl_divergence()
    quality = Quality(perplexity, kl, divergence.top1_agreement(), None, "float32", 0, 0)
    values = {name: quality.metric(name) for name in METRICS}
    return {
        name: value if math.isfinite(value) else math.inf
        for name, value in values.items()
        if value is not None
    }


def _would_hold(gate: GateOutcome, value: float) -> bool:
    """Whether a figure would pass; with confidence, as far from its interval's ends as now."""
    low = high = value
    if gate.interval is not None and gate.value:
        low *= gate.interval.low / gate.value
        high *= gate.interval.high / gate.value
    if gate.metric.startswith("kl_divergence"):
        high *= _MARGIN
    return (gate.min is None or low >= gate.min) and (gate.max is None or high <= gate.max)


def _recipe(manifest: dict[str, Any], artifact: Path) -> Recipe:
    """The recipe of an artifact, its calibration text where it lies here, if it still does."""
    content = manifest["recipe"]["content"]
    if content.get("calibration"):
        dataset, wanted = content["calibration"]["dataset"], manifest["calibration"]
        said = read_optional_json(artifact / RUN).get("recipe")
        folders = [*([Path(said).parent] if said else []), resources.recipes(), Path.cwd()]
        for file in ((folder / dataset).resolve() for folder in folders):
            if file.is_file() and sha256(file) == wanted["dataset_sha256"]:
                calibration = {**content["calibration"], "dataset": str(file)}
                content = {**content, "calibration": calibration}
                break
    return recipe_from(content, artifact / MANIFEST)
