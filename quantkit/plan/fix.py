"""A recipe that has failed, derived anew: more bits for the linears that lose most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.base.errors import InputError
from quantkit.checkpoint.reader import Checkpoint
from quantkit.methods.ggml.method import MixMethod
from quantkit.methods.ggml.types import CASTS, block_size
from quantkit.methods.grids import Grid
from quantkit.methods.method import AffineMethod
from quantkit.plan.base import Plan
from quantkit.plan.gguf import GgufFilePlan
from quantkit.plan.linears import LinearPlan
from quantkit.plan.recipe import plan_recipe
from quantkit.recipes.recipe import Recipe, recipe_from

_SUFFIX = "-fixed"
_BITS = 8
_TYPE, _FLOAT = "Q8_0", "BF16"

Change = dict[str, Any]  # an override, or {"ignore": NAME} for methods that have none


@dataclass(frozen=True)
class Fixed:
    """A derived recipe.

    content: as a file would hold it; changes: what it adds; nbytes: of its artifact; added_bytes:
    how many of them the changes cost.
    """

    content: dict[str, Any]
    changes: tuple[Change, ...]
    nbytes: int
    added_bytes: int


def fix(
    recipe: Recipe, modules: Sequence[str], keys: Sequence[str], checkpoint: Checkpoint, name: str
) -> Fixed:
    """Derive a recipe that gives ``modules`` (full names; ``keys``: of their weights) more bits.

    They get eight bits where the format holds them and the linear has fewer; otherwise it is left
    in the checkpoint's dtype. The name gets the suffix ``-fixed`` and the version its next minor
    number. ``name``: the model's. Raises InputError when the plan refuses every way.
    """
    plan = plan_recipe(recipe, checkpoint, name)
    ways = _ways(recipe, plan, modules, keys)
    for changes in ways:
        content = _derived(recipe, changes)
        try:
            fixed = plan_recipe(recipe_from(content, Path(content["name"])), checkpoint, name)
        except InputError:
            if changes is ways[-1]:
                raise
            continue
        return Fixed(content, tuple(changes), fixed.nbytes, fixed.nbytes - plan.nbytes)
    raise AssertionError("there is always a way")


def _ways(
    recipe: Recipe, plan: Plan, modules: Sequence[str], keys: Sequence[str]
) -> list[list[Change]]:
    """Changes to the recipe, the cheapest first; the plan decides which of them are possible."""
    if isinstance(recipe.quantize, MixMethod) and isinstance(plan, GgufFilePlan):
        return [_types(plan, keys)]
    linears = plan.linears if isinstance(plan, GgufFilePlan) else plan
    if not isinstance(recipe.quantize, AffineMethod) or not isinstance(linears, LinearPlan):
        return [[{"ignore": name} for name in modules]]
    skipped: list[Change] = [{"match": name, "skip": True} for name in modules]
    return [[_bits(linears, name) for name in modules], skipped]


def _bits(plan: LinearPlan, name: str) -> Change:
    scheme = plan.schemes.get(name)
    few = isinstance(scheme, Grid) and scheme.bits < _BITS
    return {"match": name, "bits": _BITS} if few else {"match": name, "skip": True}


def _types(plan: GgufFilePlan, keys: Sequence[str]) -> list[Change]:
    changes: list[Change] = []
    for tensor in plan.file.tensors:
        if tensor.key not in keys or tensor.type in CASTS:
            continue
        fits = tensor.shape[-1] % block_size(_TYPE)[0] == 0 and tensor.type != _TYPE
        changes.append({"match": tensor.name, "type": _TYPE if fits else _FLOAT})
    return changes


def _derived(recipe: Recipe, changes: Sequence[Change]) -> dict[str, Any]:
    content = recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    major, minor, _ = recipe.version.split(".")
    content["name"] = recipe.name.removesuffix(_SUFFIX) + _SUFFIX
    content["version"] = f"{major}.{int(minor) + 1}.0"
    content["description"] = f"{recipe.name} {recipe.version} with more bits where it lost most"
    method = content["quantize"]
    overrides = [change for change in changes if "ignore" not in change]
    ignored = [change["ignore"] for change in changes if "ignore" in change]
    if overrides:
        method["overrides"] = [*method.get("overrides", []), *overrides]
    if ignored:
        method["ignore"] = [*recipe.model_dump()["quantize"]["ignore"], *ignored]
    return content
