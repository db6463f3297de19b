"""A GGUF file whose linears are on integer grids: two plans that must agree."""

from __future__ import annotations

from dataclasses import replace

import torch

from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.gguf import grids as gguf_grids
from quantkit.formats.gguf.file import GgufTensorPlan, plan_file
from quantkit.methods.ggml.types import row_bytes
from quantkit.methods.grids import Grid
from quantkit.model.skeleton import Skeleton
from quantkit.plan.linears import GgufFilePlan, describe_tensors, plan_linears
from quantkit.recipes.recipe import Awq, Gptq, Rtn

_AS_IT_IS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def plan_grids(
    method: Rtn | Gptq | Awq, skeleton: Skeleton, checkpoint: Checkpoint, name: str
) -> GgufFilePlan:
    """Give the linears of the blocks the types that hold their grids exactly.

    Linears of the blocks that the recipe skips keep their dtype. All other tensors get the types
    of llama.cpp's mix that goes by the name of the recipe's own grid. ``name`` becomes
    ``general.name``. Raises InputError.
    """
    linears = plan_linears(method, skeleton, checkpoint)
    grids = {skeleton.key(f"{module}.weight"): grid for module, grid in linears.schemes.items()}
    inside = {
        skeleton.key(f"{skeleton.layer_name(index)}.{module}.weight")
        for index in range(len(skeleton.layers))
        for module in skeleton.linears(index)
    }
    default = Grid(method.bits, method.group_size, method.symmetric)
    file = plan_file(checkpoint, gguf_grids.ggml_type(default).lower(), name=name)

    def planned(tensor: GgufTensorPlan) -> GgufTensorPlan:
        if tensor.key is None or tensor.key not in inside:
            return tensor
        grid = grids.get(tensor.key)
        if isinstance(grid, Grid):
            type = gguf_grids.ggml_type(grid)
        else:
            type = _AS_IT_IS[checkpoint.dtype(tensor.key)]
        nbytes = tensor.shape[0] * row_bytes(type, tensor.shape[1])
        return replace(tensor, type=type, wanted=type, nbytes=nbytes)

    file = replace(file, tensors=tuple(map(planned, file.tensors)))
    return GgufFilePlan(method.method, "gguf", describe_tensors(file), file, linears)
