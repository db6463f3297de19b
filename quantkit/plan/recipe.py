"""Which plan a recipe gets."""

from __future__ import annotations

from quantkit.checkpoint.reader import Checkpoint
from quantkit.model.skeleton import Skeleton
from quantkit.plan.gguf import plan_grids
from quantkit.plan.linears import Plan, plan_gguf, plan_linears
from quantkit.recipes.recipe import Awq, Ggml, Gptq, GptqGguf, Recipe, Rtn


def plan_recipe(recipe: Recipe, checkpoint: Checkpoint, name: str) -> Plan:
    """What the recipe makes of a checkpoint; ``name``: the model's. Raises InputError."""
    method = recipe.quantize
    if isinstance(method, Ggml | GptqGguf):
        return plan_gguf(method, checkpoint, name, imatrix=recipe.calibration is not None)
    if isinstance(method, Rtn | Gptq | Awq) and method.format == "gguf":
        return plan_grids(method, Skeleton(checkpoint), checkpoint, name)
    return plan_linears(method, Skeleton(checkpoint), checkpoint)
