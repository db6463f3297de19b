"""The AWQ GEMM format, as AutoAWQ wrote it and vLLM and transformers read it.

Per linear: ``qweight`` int32 (in, out/8), ``qzeros`` int32 (groups, out/8), ``scales`` fp16
(groups, out). Eight output columns share a word; nibble i holds column [0,2,4,6,1,3,5,7][i].
Always 4 bits, always with zero points (symmetric codes have zero point 8).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quantkit.base.errors import InputError
from quantkit.formats import words
from quantkit.methods.grids import Grid, QuantizedTensor

SUFFIXES = ("qweight", "qzeros", "scales")
MARKERS = ("qweight",)  # the suffixes that only a quantized linear has
READ = SUFFIXES  # every suffix that others' linears may have
FIRST_ZERO = 0
_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
_INVERSE = [_ORDER.index(i) for i in range(8)]


def check(name: str, shape: tuple[int, int], grid: Grid, default: Grid) -> None:
    """Raise InputError when the format can't hold this linear's grid."""
    if grid.bits != 4:
        raise InputError(
            f"the awq format holds 4 bits only, not {grid.bits}",
            where=name,
            fix="Use format: gptq (2, 3, 4 or 8 bits), or skip this module.",
        )
    if (grid.bits, grid.group_size) != (default.bits, default.group_size):
        raise InputError(
            f"the awq format holds one group size for all modules ({default.group_size}), "
            f"not also {grid.group_size}",
            where=name,
            fix="Use format: gptq, which holds exceptions, or skip this module.",
        )
    if shape[0] % 8:
        raise InputError(f"{shape[0]} outputs aren't divisible by 8, as awq needs", where=name)


def nbytes(shape: tuple[int, int], grid: Grid) -> int:
    """Bytes of one packed linear."""
    groups = shape[1] // grid.columns(shape[1])
    return shape[0] * shape[1] // 2 + groups * shape[0] // 2 + groups * shape[0] * 2


def pack(tensor: QuantizedTensor) -> dict[str, Tensor]:
    """Codes, scales and zeros → the format's tensors."""
    return {
        "qweight": _pack(tensor.codes.t()),
        "qzeros": _pack(tensor.zeros.t()),
        "scales": tensor.scales.t().to(torch.float16).contiguous(),
    }


def unpack(tensors: dict[str, Tensor], config: dict[str, Any], module: str) -> QuantizedTensor:
    """The format's tensors → codes, scales and zeros."""
    return QuantizedTensor(
        scheme(lambda suffix: tuple(tensors[suffix].shape), tensors.__getitem__, config, module),
        _unpack(tensors["qweight"]).t().contiguous(),
        tensors["scales"].t().float().contiguous(),
        _unpack(tensors["qzeros"]).t().contiguous(),
    )


def scheme(
    shape: Callable[[str], tuple[int, ...]],
    read: Callable[[str], Tensor],
    config: dict[str, Any],
    module: str,
) -> Grid:
    """The grid of a packed linear, by the shapes of its tensors."""
    out_features, in_features = weight_shape(shape, read)
    groups = shape("scales")[0]
    fitting = shape("scales")[1] == out_features and shape("qzeros") == (groups, out_features // 8)
    if not fitting or in_features % groups:
        raise InputError("its qweight, qzeros and scales don't belong together", where=module)
    per_row = groups == 1 and config.get("group_size", -1) == -1
    return Grid(4, -1 if per_row else in_features // groups, not config.get("zero_point", True))


def weight_shape(
    shape: Callable[[str], tuple[int, ...]], read: Callable[[str], Tensor]
) -> tuple[int, ...]:
    """(out, in) of a packed linear, from the shape and value of its tensors by suffix."""
    in_features, words_out = shape("qweight")
    return words_out * 8, in_features


def config(default: Grid, grids: dict[str, Grid], skipped: list[str]) -> dict[str, Any]:
    """``quantization_config`` of config.json."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": default.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": skipped,
    }


def _pack(codes: Tensor) -> Tensor:
    """uint8 (n, m) → int32 (n, m/8), packed along dimension 1 in AWQ's order."""
    ordered = codes.unflatten(1, (-1, 8))[..., _ORDER].flatten(1)
    return words.pack(ordered.t().contiguous(), 4).t().contiguous()


def _unpack(packed: Tensor) -> Tensor:
    ordered = words.unpack(packed.t().contiguous(), 4).t()
    return ordered.unflatten(1, (-1, 8))[..., _INVERSE].flatten(1)
