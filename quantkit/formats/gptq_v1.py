"""The GPTQ format, version 1, as AutoGPTQ wrote it and vLLM and transformers read it.

Per linear: ``qweight`` int32 (in·bits/32, out), packed along in, the first row in the low bits;
``qzeros`` int32 (groups, out·bits/32), packed along out, holding zero point - 1; ``scales`` fp16
(groups, out); ``g_idx`` int32 (in), the group of each input feature. Activation order is static,
so g_idx is k // group_size and ``desc_act`` is false.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import InputError
from quantkit.formats import bits as words
from quantkit.quantizers.grid import Grid, QuantizedTensor

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
MARKER = "qweight"  # the suffix that only a quantized linear has
FIRST_ZERO = 1
_BITS = (2, 3, 4, 8)


def check(name: str, shape: tuple[int, int], grid: Grid, default: Grid) -> None:
    """Raise InputError when the format can't hold this linear's grid."""
    if grid.bits not in _BITS:
        raise InputError(
            f"the gptq format holds {', '.join(map(str, _BITS))} bits, not {grid.bits}",
            where=name,
            mend="Choose one of these, or skip this module.",
        )
    if grid.symmetric != default.symmetric:
        raise InputError("the gptq format holds one symmetry for all modules", where=name)
    if shape[0] % 32 or shape[1] % 32:
        raise InputError(
            f"shape {shape[0]} x {shape[1]} isn't divisible by 32, as gptq kernels need",
            where=name,
            mend="Skip this module (overrides: match, skip: true).",
        )


def nbytes(shape: tuple[int, int], grid: Grid) -> int:
    """Bytes of one packed linear."""
    out_features, in_features = shape
    groups = in_features // grid.columns(in_features)
    codes = out_features * in_features * grid.bits // 8
    return (
        codes + groups * out_features * grid.bits // 8 + groups * out_features * 2 + in_features * 4
    )


def pack(tensor: QuantizedTensor) -> dict[str, Tensor]:
    """Codes, scales and zeros → the format's tensors."""
    bits = tensor.grid.bits
    in_features = tensor.codes.shape[1]
    # Stored as z - 1. Readers add 1 to whole words, so z = 0 would carry into its neighbours:
    # FIRST_ZERO keeps zero points above that.
    zeros = tensor.zeros.t() - 1
    return {
        "qweight": words.pack(tensor.codes.t().contiguous(), bits),
        "qzeros": words.pack(zeros.t().contiguous(), bits).t().contiguous(),
        "scales": tensor.scales.t().to(torch.float16).contiguous(),
        "g_idx": (torch.arange(in_features) // tensor.grid.columns(in_features)).to(torch.int32),
    }


def unpack(tensors: dict[str, Tensor], config: dict[str, Any], module: str) -> QuantizedTensor:
    """The format's tensors → codes, scales and zeros. Raises InputError for permuted groups."""
    grid = _grid_of(module, config)
    bits = grid.bits
    codes = words.unpack(tensors["qweight"], bits).t().contiguous()
    groups = tensors["g_idx"]
    expected = torch.arange(codes.shape[1]) // grid.columns(codes.shape[1])
    if not torch.equal(groups.to(torch.int64), expected):
        raise InputError("its groups are permuted (desc_act), which isn't supported", where=module)
    zeros = words.unpack(tensors["qzeros"].t().contiguous(), bits) + 1
    zeros &= grid.levels  # some writers let z = 0 wrap
    return QuantizedTensor(grid, codes, tensors["scales"].t().float().contiguous(), zeros)


def weight_shape(
    shape: Callable[[str], tuple[int, ...]], read: Callable[[str], Tensor]
) -> tuple[int, ...]:
    """(out, in) of a packed linear, from the shape and value of its tensors by suffix."""
    return shape("qweight")[1], *shape("g_idx")


def config(default: Grid, grids: dict[str, Grid], skipped: list[str]) -> dict[str, Any]:
    """``quantization_config`` of config.json; also written as quantize_config.json.

    Exceptions are said twice: ``modules_in_block_to_quantize`` is what transformers reads,
    ``dynamic`` (regexes: ``-:`` skips, ``+:`` changes) what vLLM and GPTQModel read.
    """
    dynamic: dict[str, Any] = {
        f"-:^{re.escape(name)}$": {} for name in skipped if name != "lm_head"
    }
    for name, grid in grids.items():
        if grid != default:
            dynamic[f"+:^{re.escape(name)}$"] = {"bits": grid.bits, "group_size": grid.group_size}
    result: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": default.bits,
        "group_size": default.group_size,
        "desc_act": False,
        "sym": default.symmetric,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "true_sequential": False,
    }
    if dynamic:
        result["modules_in_block_to_quantize"] = [list(grids)]
        result["dynamic"] = dynamic
    return result


def _grid_of(module: str, config: dict[str, Any]) -> Grid:
    grid = Grid(config["bits"], config["group_size"], config["sym"], FIRST_ZERO)
    for pattern, changes in (config.get("dynamic") or {}).items():
        if pattern.startswith("+:") and re.match(pattern[2:], module):
            grid = replace(
                grid, **{k: v for k, v in changes.items() if k in ("bits", "group_size")}
            )
    return grid
