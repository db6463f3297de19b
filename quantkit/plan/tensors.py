"""Every tensor of an artifact in safetensors: quantized, or as it is in the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from quantkit.base.names import dtype_name
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.registry import FORMATS
from quantkit.methods.linears import Scheme
from quantkit.model.skeleton import Skeleton
from quantkit.plan.base import PlannedTensor


def planned_tensors(
    format_name: str, schemes: Mapping[str, Scheme], skeleton: Skeleton, checkpoint: Checkpoint
) -> tuple[PlannedTensor, ...]:
    """The tensors, in the order of the model, and what it has no use for in the end.

    schemes: of the linears that are quantized, by full name. A tensor that holds all experts is
    replaced by their parts where one of them is quantized.
    """
    source, dtype = skeleton.viewed(checkpoint), skeleton.model.dtype
    quantized = {skeleton.key(f"{name}.weight"): scheme for name, scheme in schemes.items()}
    tensors = []
    for key in stored_keys(skeleton, quantized, checkpoint):
        shape = source.shape(key)
        if key in quantized:
            scheme, size = quantized[key], (shape[0], shape[1])
            nbytes = FORMATS[format_name].nbytes(size, scheme, dtype)
            tensors.append(PlannedTensor(key, shape, str(scheme), nbytes, quantized=True))
        else:
            stored = source.dtype(key)
            nbytes = torch.Size(shape).numel() * stored.itemsize
            tensors.append(PlannedTensor(key, shape, dtype_name(stored), nbytes, quantized=False))
    return tuple(tensors)


def stored_keys(
    skeleton: Skeleton, quantized: Mapping[str, object], checkpoint: Checkpoint
) -> list[str]:
    """The keys of an artifact's tensors, a quantized one's being that of its weight."""
    views = skeleton.views
    # The experts of a layer go apart together, with their biases.
    apart = {_holder(key) for key in quantized if key in views}
    parts = {key for key in views if _holder(key) in apart}
    replaced = {views[key].key for key in parts}
    keys: dict[str, None] = {}
    for key in skeleton.names.values():
        if key in parts:
            keys[key] = None
        elif (stored := views[key].key if key in views else key) not in replaced:
            keys[stored] = None
    rest = [key for key in sorted(checkpoint.keys()) if key not in keys and key not in replaced]
    return [*keys, *rest]


def _holder(key: str) -> str:
    """The name of all experts, of the key of one expert's tensor."""
    return key.rsplit(".", 3)[0]
