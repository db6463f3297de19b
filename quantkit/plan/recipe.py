"""Which plan a recipe gets."""

from __future__ import annotations

from quantkit.checkpoint.reader import Checkpoint
from quantkit.methods.ggml.method import MixMethod
from quantkit.methods.method import LinearMethod
from quantkit.model.skeleton import Skeleton
from quantkit.plan.base import Plan
from quantkit.plan.gguf import plan_grids, plan_mix
from quantkit.plan.linears import plan_linears
from quantkit.recipes.recipe import Recipe


def plan_recipe(recipe: Recipe, checkpoint: Checkpoint, name: str) -> Plan:
    """What the recipe makes of a checkpoint; ``name``: the model's. Raises InputError."""
    method = recipe.quantize
    if isinstance(method, MixMethod):
        return plan_mix(method, checkpoint, name, calibrated=recipe.calibration is not None)
    assert isinstance(method, LinearMethod)
    if method.format == "gguf":
        return plan_grids(method, Skeleton(checkpoint), checkpoint, name)
    return plan_linears(method, Skeleton(checkpoint), checkpoint)
