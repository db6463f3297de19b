"""``quantkit-int4``: transformers' model with its 4-bit linears on torch's own CPU kernel.

Codes of awq, gptq and compressed-tensors go to ``aten::_weight_int4pack_mm_for_cpu`` unchanged: its
grid is w = (q - 8) * s + b, so b = (8 - z) * s. Only the packed words, scales and offsets are kept
in memory. Columns whose groups are permuted are sorted by group, and so are the inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantkit.base.errors import MachineError
from quantkit.formats.packed import PackedCheckpoint
from quantkit.methods.grids import Grid, QuantizedTensor
from quantkit.model.parameters import Parameters
from quantkit.model.skeleton import Skeleton

NAME = "quantkit-int4"
_GROUP_SIZES = (32, 64, 128, 256)


class Int4Linear(nn.Module):
    """A linear on packed 4-bit codes.

    weight: uint8 (out, in/2) in the kernel's own order; scales_and_offsets: (groups, out, 2) in
    the dtype of the activations; order: int64 (in), the input of each column, or None.
    """

    def __init__(self, tensor: QuantizedTensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = tensor.codes.shape
        self.group_size = tensor.grid.columns(self.in_features)
        order = None if tensor.groups is None else tensor.groups.argsort(stable=True)
        codes = tensor.codes if order is None else tensor.codes[:, order]
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 2)
        offsets = (8 - tensor.zeros.float()) * tensor.scales
        both = torch.stack([tensor.scales.t(), offsets.t()], dim=-1).contiguous().to(dtype)
        self.register_buffer("weight", packed)
        self.register_buffer("scales_and_offsets", both)
        self.register_buffer("bias", None if bias is None else bias.to(dtype))
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        if self.order is not None:
            rows = rows[:, self.order]
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows, self.weight, self.group_size, self.scales_and_offsets
        )
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)


def fits(grid: object, shape: tuple[int, ...]) -> bool:
    """Whether the kernel can compute with a weight of this shape (out, in) on a grid."""
    if not isinstance(grid, Grid) or grid.bits != 4 or shape[0] % 16:
        return False
    columns = shape[1] if grid.group_size == -1 else grid.group_size
    return columns in _GROUP_SIZES and shape[1] % columns == 0


def runs(source: PackedCheckpoint) -> bool:
    """Whether the kernel can compute any of a checkpoint's linears."""
    return any(fits(source.scheme_of(key), source.shape(key)) for key in source.quantized())


def _even(tensor: QuantizedTensor) -> bool:
    """Whether every group has as many columns as the others."""
    return tensor.groups is None or len(set(tensor.groups.bincount().tolist())) == 1


def load(source: PackedCheckpoint) -> tuple[Any, str]:
    """The model in memory, and the engine's name, with the number of linears that stay dense.

    Raises MachineError where torch has no such kernel, or none of the linears fits it.
    """
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        raise MachineError("this build of torch has no 4-bit CPU kernel", where=NAME)
    skeleton = Skeleton(source)
    model = skeleton.model
    parameters = {key: name for name, key in skeleton.names.items()}
    placed = set()
    for key in source.quantized():
        if not fits(source.scheme_of(key), source.shape(key)):
            continue
        tensor = source.read_quantized(key)
        if not isinstance(tensor, QuantizedTensor) or not _even(tensor):
            continue
        weight = parameters[key]
        bias = weight.removesuffix("weight") + "bias"
        value = source.read(skeleton.key(bias)) if bias in skeleton.names else None
        path, _, leaf = weight.removesuffix(".weight").rpartition(".")
        setattr(model.get_submodule(path), leaf, Int4Linear(tensor, value, model.dtype))
        placed |= {weight, bias}
    if not placed:
        raise MachineError(
            "none of the linears fits the 4-bit kernel (4 bits, groups of "
            f"{', '.join(map(str, _GROUP_SIZES))}, outputs divisible by 16)",
            where=NAME,
        )
    rest = [name for name in skeleton.names if name not in placed]
    Parameters(skeleton, source, torch.device("cpu")).fill(rest)
    dense = sum(name in rest for name in (parameters[key] for key in source.quantized()))
    return model, f"{NAME} ({dense} linears dense)" if dense else NAME
