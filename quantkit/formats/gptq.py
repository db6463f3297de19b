"""The GPTQ format, as AutoGPTQ wrote it and vLLM and transformers read it.

Per linear: ``qweight`` int32 (in·bits/32, out), packed along in, the first row in the low bits;
``qzeros`` int32 (groups, out·bits/32), packed along out, holding zero point - 1 (version 1, which
is written here) or the zero point (version 2); ``scales`` fp16 (groups, out); ``g_idx`` int32
(in), the group of each input feature. What is written has static activation order, so g_idx is
k // group_size and ``desc_act`` is false; others' permuted groups are read too, and whatever
bits, groups and shapes the tensors have, since ``dynamic`` settings are hard to read otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quantkit.base.errors import InputError
from quantkit.formats import words
from quantkit.methods.grids import Grid, QuantizedTensor

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
MARKERS = ("qweight",)  # the suffixes that only a quantized linear has
READ = SUFFIXES  # every suffix that others' linears may have
FIRST_ZERO = 1
_BITS = (2, 3, 4, 8)


def check(name: str, shape: tuple[int, int], grid: Grid, default: Grid) -> None:
    """Raise InputError when the format can't hold this linear's grid."""
    if grid.bits not in _BITS:
        raise InputError(
            f"the gptq format holds {', '.join(map(str, _BITS))} bits, not {grid.bits}",
            where=name,
            fix="Choose one of these, or skip this module.",
        )
    if grid.symmetric != default.symmetric:
        raise InputError("the gptq format holds one symmetry for all modules", where=name)
    if shape[0] % 32 or shape[1] % 32:
        raise InputError(
            f"shape {shape[0]} x {shape[1]} isn't divisible by 32, as gptq kernels need",
            where=name,
            fix="Skip this module (overrides: match, skip: true).",
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
    """The format's tensors → codes, scales and zeros. Raises InputError where they disagree."""
    grid = scheme(lambda suffix: tuple(tensors[suffix].shape), tensors.__getitem__, config, module)
    codes = words.unpack(tensors["qweight"], grid.bits).t().contiguous()
    return QuantizedTensor(
        grid,
        codes,
        tensors["scales"].t().float().contiguous(),
        _zeros(tensors["qzeros"], grid, config),
        _groups(tensors, codes.shape[1], grid, module),
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
    bits = shape("qzeros")[1] * 32 / out_features
    fitting = shape("scales") == (groups, out_features) and shape("qzeros")[0] == groups
    if bits not in range(2, 9) or not fitting:
        raise InputError("its qweight, qzeros and scales don't belong together", where=module)
    size = int(config.get("group_size") or -1)
    if groups != (1 if size == -1 else -(-in_features // size)):
        size = -(-in_features // groups)  # an exception to what config.json says of all
    return Grid(int(bits), size, bool(config.get("sym", True)), FIRST_ZERO)


def weight_shape(
    shape: Callable[[str], tuple[int, ...]], read: Callable[[str], Tensor]
) -> tuple[int, ...]:
    """(out, in) of a packed linear, from the shape and value of its tensors by suffix."""
    words_in, out_features = shape("qweight")
    return out_features, words_in * out_features // shape("qzeros")[1]


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


def _zeros(packed: Tensor, grid: Grid, config: dict[str, Any]) -> Tensor:
    """Zero points, uint8 (out, groups)."""
    bits = grid.bits
    if config.get("checkpoint_format") == "gptq_v2":
        return words.unpack(packed.t().contiguous(), bits)
    if _by_words(config) and 32 % bits == 0:
        ones = sum(1 << shift for shift in range(0, 32, bits))
        return words.unpack((packed.to(torch.int64) + ones).t().contiguous(), bits)
    # Some writers let z = 0 wrap.
    return (words.unpack(packed.t().contiguous(), bits) + 1) & grid.levels


def _by_words(config: dict[str, Any]) -> bool:
    """Whether 1 was taken off whole words, so that a zero point of 0 borrowed from the next."""
    return "gptqmodel" in str((config.get("meta") or {}).get("quantizer"))


def _groups(tensors: dict[str, Tensor], in_features: int, grid: Grid, module: str) -> Tensor | None:
    """The group of each column, int64 (in), unless they are consecutive and of one size."""
    count = tensors["scales"].shape[0]
    size = in_features if grid.group_size == -1 else grid.group_size
    consecutive = torch.arange(in_features) // size
    groups = tensors["g_idx"].to(torch.int64) if "g_idx" in tensors else consecutive
    if groups.shape != (in_features,) or int(groups.min()) < 0 or int(groups.max()) >= count:
        raise InputError(f"its g_idx doesn't name {count} groups of columns", where=module)
    return None if torch.equal(groups, consecutive) and in_features % count == 0 else groups
