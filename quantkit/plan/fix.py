"""A recipe fixed: more bits for the linears where its artifact loses most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.base.errors import InputError
from quantkit.checkpoint.reader import Checkpoint
from quantkit.methods.ggml.types import CASTS, block_size
from quantkit.methods.grids import Grid
from quantkit.plan.linears import GgufFilePlan, LinearPlan, Plan
from quantkit.plan.recipe import plan_recipe
from quantkit.recipes.recipe import Ggml, GptqGguf, Recipe, recipe_from

_SUFFIX = "-fixed"
_BITS = 8
_TYPE, _FLOAT = "Q8_0", "BF16"

Change = dict[str, Any]  # an override, or {"ignore": NAME} for methods that have none


@dataclass(frozen=True)
class Fixed:
    """The derived recipe as a file would hold it, what it adds, and the size of its artifact."""

    content: dict[str, Any]
    changes: tuple[Change, ...]
    nbytes: int
    added_bytes: int


def fix(
    recipe: Recipe, modules: Sequence[str], keys: Sequence[str], checkpoint: Checkpoint, name: str
) -> Fixed:
    """Give ``modules`` (full names; ``keys``: of their weights) eight bits, or all of them.

    Eight bits where the format holds them and the tensor has fewer; otherwise the linear is left
    as it is in the checkpoint. The name gets the suffix ``-fixed`` and the version its next minor
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
    """Changes to the recipe, the cheapest first; the plan says which of them can be."""
    if isinstance(recipe.quantize, Ggml | GptqGguf) and isinstance(plan, GgufFilePlan):
        return [_types(plan, keys)]
    linears = plan.linears if isinstance(plan, GgufFilePlan) else plan
    if "overrides" not in type(recipe.quantize).model_fields or not isinstance(linears, LinearPlan):
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
