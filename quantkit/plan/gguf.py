"""Plans for one GGUF file: by a mix of llama.cpp's, or with its linears on integer grids."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch

from quantkit.base.errors import InputError, not_installed
from quantkit.base.names import starred
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.gguf.file import GgufPlan, GgufTensorPlan, plan_file
from quantkit.formats.gguf.grids import ggml_type
from quantkit.formats.gguf.tensor_types import quantizable
from quantkit.formats.gguf.transforms import column_order
from quantkit.methods.ggml.method import MixMethod
from quantkit.methods.ggml.types import available, row_bytes
from quantkit.methods.grids import Grid, as_grid
from quantkit.methods.method import LinearMethod
from quantkit.model.skeleton import Skeleton
from quantkit.plan.base import FLOATS, Plan, PlannedTensor
from quantkit.plan.checks import check_corrected
from quantkit.plan.linears import LinearPlan, plan_linears

_UNQUANTIZED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class GgufFilePlan(Plan):
    """A plan for one GGUF file.

    settings: the method, as the recipe sets it; file: the file's metadata, and the names and types
    of its tensors; linears: the plan of the blocks, where their linears are on integer grids.
    """

    settings: MixMethod | LinearMethod
    file: GgufPlan
    linears: LinearPlan | None = None

    def to_json(self) -> dict[str, Any]:
        """The keys of every plan, and what was decided about the file.

        ``fallbacks``: names whose rows the mix's type can't hold, with the types wanted and given;
        ``left_out``: keys of the checkpoint's tensors that the file doesn't hold.
        """
        return {
            **super().to_json(),
            "mix": self.file.mix,
            "architecture": self.file.architecture,
            "pre_tokenizer": self.file.metadata["tokenizer.ggml.pre"],
            "fallbacks": {
                tensor.name: {"wanted": tensor.wanted, "type": tensor.type}
                for tensor in self.file.fallbacks
            },
            "left_out": list(self.file.left_out),
        }


def plan_mix(
    method: MixMethod, checkpoint: Checkpoint, name: str, *, calibrated: bool
) -> GgufFilePlan:
    """Give every tensor the type that the mix has for it.

    ``name`` becomes ``general.name``. ``calibrated``: the matrices of the blocks will be quantized
    with importance weights, which some mixes require. Raises InputError.
    """
    file = plan_file(
        checkpoint,
        method.mix,
        method.overrides,
        name=name,
        imatrix=calibrated,
        no_fallback=method.no_fallback,
        pre_tokenizer=method.pre_tokenizer,
    )
    if any(tensor.experts for tensor in file.tensors):
        check_corrected(method, str(checkpoint.directory))
    return GgufFilePlan(
        method.method, method.format, _described(file), method, file, notes=file.notes
    )


def plan_grids(
    method: LinearMethod, skeleton: Skeleton, checkpoint: Checkpoint, name: str
) -> GgufFilePlan:
    """Give the linears of the blocks the types that hold their grids exactly.

    Linears of the blocks that the recipe skips keep their dtype. All other tensors get the types
    of llama.cpp's mix that has the name of the recipe's own grid. ``name`` becomes
    ``general.name``. Raises InputError.
    """
    linears = plan_linears(method, skeleton, checkpoint)
    grids = {skeleton.key(f"{module}.weight"): grid for module, grid in linears.schemes.items()}
    names = {skeleton.key(f"{module}.weight"): module for module in linears.schemes}
    inside = {
        skeleton.key(f"{skeleton.layer_name(index)}.{module}.weight")
        for index in range(len(skeleton.layers))
        for module in skeleton.linears(index)
    }
    default = as_grid(method.default_scheme())
    file = plan_file(checkpoint, ggml_type(default).lower(), name=name)

    source = file.viewed(checkpoint)
    counts = Counter(part.key for part in file.parts)
    twice = {key for key, count in counts.items() if count > 1}

    def type_of(key: str) -> str:
        grid = grids.get(key)
        return ggml_type(grid) if isinstance(grid, Grid) else _UNQUANTIZED[source.dtype(key)]

    def planned(tensor: GgufTensorPlan) -> GgufTensorPlan:
        keys = [part.key for part in tensor.parts if part.key is not None and part.key in inside]
        types = {type_of(key): key for key in keys}
        if not types:
            return tensor
        split = keys[0] in twice
        if split or not quantizable(tensor.name, tensor.shape):
            if key := next((key for key in keys if key in grids), None):
                why = "is stored in two parts" if split else f"is {tensor.type} in every GGUF file"
                raise InputError(
                    f"{why}, and can't be on an integer grid",
                    subject=key,
                    fix=f"Add it to quantize.ignore: {json.dumps(starred(names[key]))}.",
                )
            if not split:
                return tensor
        if column_order(tensor.transform, tensor.shape[-1]) is not None and keys[0] in grids:
            raise InputError(
                "has its columns in another order in GGUF, which groups on a grid don't follow",
                subject=keys[0],
                fix=f"Add it to quantize.ignore: {json.dumps(starred(names[keys[0]]))}; or name a "
                "mix (methods ggml and gptq).",
            )
        if len(types) > 1:
            raise InputError(
                f"holds all experts of a layer in one type, and the recipe gives them "
                f"{', '.join(types)} ({', '.join(types.values())})",
                subject=f"GGUF's {tensor.name}",
                fix="Use patterns that match all experts of a layer, such as *.experts.*.",
            )
        [type] = types
        nbytes = math.prod(tensor.shape[:-1]) * row_bytes(type, tensor.shape[-1])
        return replace(tensor, type=type, wanted=type, nbytes=nbytes)

    file = replace(file, tensors=tuple(map(planned, file.tensors)))
    return GgufFilePlan(
        method.method,
        "gguf",
        _described(file),
        method,
        file,
        linears,
        notes=(*file.notes, *linears.notes),
        kept=linears.kept,
    )


def _described(file: GgufPlan) -> tuple[PlannedTensor, ...]:
    """A file's tensors. Raises MachineError where this machine can't quantize to their types."""
    if {tensor.type for tensor in file.tensors} - set(available()):
        raise not_installed("xllamacpp", "gguf")
    return tuple(
        PlannedTensor(
            tensor.name,
            tensor.shape,
            f"{tensor.type} (for {tensor.wanted})" if tensor.fallback else tensor.type,
            tensor.nbytes,
            quantized=tensor.type not in FLOATS,
        )
        for tensor in file.tensors
    )
