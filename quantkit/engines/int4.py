"""``quantkit-int4``: transformers' model with its 4-bit linears on torch's own kernels.

On a CPU codes of awq, gptq and compressed-tensors go to ``aten::_weight_int4pack_mm_for_cpu``
unchanged, on CUDA to ``aten::_weight_int4pack_mm``, which takes bfloat16 alone. The grid of both is
w = (q - 8) * s + b, so b = (8 - z) * s. Only the packed words, scales and offsets are kept in
memory. Columns whose groups are permuted are sorted by group, and so are the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.base.errors import MachineError
from quantkit.base.names import dtype_name
from quantkit.formats.packed import PackedCheckpoint
from quantkit.methods.grids import Grid, QuantizedTensor
from quantkit.model.parameters import Parameters
from quantkit.model.skeleton import Skeleton

NAME = "quantkit-int4"
CPU = torch.device("cpu")
_GROUP_SIZES = (32, 64, 128, 256)


class Int4Linear(nn.Module):
    """A linear on packed 4-bit codes.

    weight: the codes in the kernel's own order, (out, in/2) uint8 on a CPU, (out/8, in/16/tiles,
    32, tiles/2) int32 on CUDA; scales_and_offsets: (groups, out, 2) in the dtype of the
    activations; order: int64 (in), the input of each column, or None.
    """

    weight: Tensor
    scales_and_offsets: Tensor
    bias: Tensor | None

    def __init__(
        self,
        tensor: QuantizedTensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        device: torch.device = CPU,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = tensor.codes.shape
        self.group_size = tensor.grid.columns(self.in_features)
        order = None if tensor.groups is None else tensor.groups.argsort(stable=True)
        codes = tensor.codes if order is None else tensor.codes[:, order]
        offsets = (8 - tensor.zeros.float()) * tensor.scales
        both = torch.stack([tensor.scales.t(), offsets.t()], dim=-1).contiguous().to(dtype)
        packed, self._multiply = _KERNELS[device.type](codes.to(device))
        self.register_buffer("weight", packed)
        self.register_buffer("scales_and_offsets", both.to(device))
        self.register_buffer("bias", None if bias is None else bias.to(device, dtype))
        self.order = None if order is None else order.to(device)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        if self.order is not None:
            rows = rows[:, self.order]
        y = self._multiply(rows.contiguous(), self.weight, self.group_size, self.scales_and_offsets)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)


Kernel = tuple[Tensor, Callable[..., Tensor]]


def _for_cpu(codes: Tensor) -> Kernel:
    """Codes (out, in) as the CPU's kernel reads them, and that kernel."""
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 2)
    return packed, torch.ops.aten._weight_int4pack_mm_for_cpu


def _for_cuda(codes: Tensor) -> Kernel:
    """The same for CUDA: it takes two codes to a byte, the even column's in the upper half."""
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
    # So many tiles of 16 columns are kept together; the more, the wider the kernel reads.
    tiles = next(count for count in (8, 4, 2) if codes.shape[1] % (16 * count) == 0)
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, tiles)
    return packed, torch.ops.aten._weight_int4pack_mm


_KERNELS = {"cpu": _for_cpu, "cuda": _for_cuda}


def fits(grid: object, shape: tuple[int, ...]) -> bool:
    """Whether the kernels can compute with a weight of this shape (out, in) on a grid."""
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


def load(source: PackedCheckpoint, device: torch.device = CPU) -> tuple[Any, str]:
    """The model in memory, and the engine's name, with the number of linears that stay dense.

    Raises MachineError where torch has no such kernel, or none of the linears fits it.
    """
    skeleton = Skeleton(source)
    model = skeleton.model
    _check_kernel(device, model.dtype)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
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
        setattr(model.get_submodule(path), leaf, Int4Linear(tensor, value, model.dtype, device))
        placed |= {weight, bias}
    if not placed:
        raise MachineError(
            "none of the linears fits the 4-bit kernel (4 bits, groups of "
            f"{', '.join(map(str, _GROUP_SIZES))}, outputs divisible by 16)",
            where=NAME,
        )
    rest = [name for name in skeleton.names if name not in placed]
    Parameters(skeleton, source, device).fill(rest)
    dense = sum(name in rest for name in (parameters[key] for key in source.quantized()))
    return model, f"{NAME} ({dense} linears dense)" if dense else NAME


def _check_kernel(device: torch.device, dtype: torch.dtype) -> None:
    """Raise MachineError where torch can't multiply 4-bit codes on ``device``."""
    if device.type != "cuda":
        if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
            raise MachineError("this build of torch has no 4-bit CPU kernel", where=NAME)
        return
    why = None
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        why = "torch's 4-bit kernel needs an NVIDIA GPU of compute capability 8.0"
    elif dtype != torch.bfloat16:
        why = (
            f"torch's 4-bit kernel computes in bfloat16 there, and the model in {dtype_name(dtype)}"
        )
    if why is not None:
        raise MachineError(
            f"no engine of ours runs it on {device}: {why}",
            where=NAME,
            fix="Use --device cpu.",
        )
