"""The compressed-tensors format, as llm-compressor writes it and vLLM and transformers read it.

Everything lies as the weight did, (out, in), in one of three layouts.

``pack-quantized``, weights alone, has per linear ``weight_packed`` int32 (out, in·bits/32), packed
along in, the first code in the low bits; ``weight_scale`` (out, groups) in the model's dtype;
``weight_shape`` int64 (2,); and for asymmetric grids ``weight_zero_point`` int32 (out·bits/32,
groups), packed along out. What is stored is the signed code plus 2^(bits-1), which is the code of
``Grid``.

``int-quantized`` and ``float-quantized``, where engines round each token of the inputs as well,
have ``weight`` (out, in), int8 or float8_e4m3fn, and ``weight_scale`` (out, 1).

Read, but not written: packed codes of other numbers of bits (as many as fit to a word, or one
stream), permuted groups (``weight_g_idx``), 8-bit weights with one scale a tensor or with inputs
that are left alone, and inputs with one scale for all (``input_scale``).

Reference: compressed_tensors' ``compressors`` and ``quantization/quant_args.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantkit.base.errors import InputError
from quantkit.formats import words
from quantkit.methods.fp8 import Fp8Scheme, Fp8Tensor
from quantkit.methods.grids import Grid, QuantizedTensor
from quantkit.methods.inputs import Rounding, round_fp8, round_int8

Scheme = Grid | Fp8Scheme

SUFFIXES = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
MARKERS = ("weight_scale",)  # the suffixes that only a quantized linear has
# Every suffix that others' linears may have.
READ = (*SUFFIXES, "weight_g_idx", "input_scale", "input_zero_point")
FIRST_ZERO = 0
_BITS = (2, 4, 8)  # of others, readers of different age expect different words
_VERSION = "0.17.0"  # of the layout


def check(name: str, shape: tuple[int, int], grid: Grid, default: Grid) -> None:
    """Raise InputError when the format can't hold this linear's grid."""
    if grid.bits not in _BITS:
        raise InputError(
            f"the compressed-tensors format holds {', '.join(map(str, _BITS))} bits, "
            f"not {grid.bits}",
            where=name,
            fix="Choose one of these, format: gptq (2, 3, 4 or 8 bits), or format: gguf (all, by "
            "the type of a mix).",
        )
    if grid.rounds_inputs:
        return
    per_word = 32 // grid.bits
    for size, what in ((shape[1], "inputs"), (0 if grid.symmetric else shape[0], "outputs")):
        if size % per_word:
            raise InputError(
                f"{size} {what} aren't divisible by {per_word}, the codes that share a word",
                where=name,
                fix="Skip this module (overrides: match, skip: true).",
            )


def nbytes(shape: tuple[int, int], grid: Scheme, dtype: torch.dtype) -> int:
    """Bytes of one packed linear of a model in ``dtype``."""
    out_features, in_features = shape
    if isinstance(grid, Fp8Scheme) or grid.rounds_inputs:
        return out_features * in_features + out_features * dtype.itemsize
    groups = in_features // grid.columns(in_features)
    zeros = 0 if grid.symmetric else out_features * groups * grid.bits // 8
    codes = out_features * in_features * grid.bits // 8
    return codes + zeros + out_features * groups * dtype.itemsize + 2 * 8


def pack(tensor: QuantizedTensor | Fp8Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Codes, scales and zeros → the format's tensors, for a model in ``dtype``."""
    if isinstance(tensor, Fp8Tensor):
        return {"weight": tensor.codes, "weight_scale": tensor.scales.to(dtype)}
    if tensor.grid.rounds_inputs:
        codes = tensor.codes.to(torch.int16).sub_(tensor.grid.middle).to(torch.int8)
        return {"weight": codes, "weight_scale": tensor.scales.to(dtype)}
    bits = tensor.grid.bits
    parts = {
        "weight_packed": words.pack(tensor.codes.t().contiguous(), bits).t().contiguous(),
        "weight_scale": tensor.scales.to(dtype),
        "weight_shape": torch.tensor(tensor.shape, dtype=torch.int64),
    }
    if not tensor.grid.symmetric:
        parts["weight_zero_point"] = words.pack(tensor.zeros, bits)
    return parts


def unpack(
    tensors: dict[str, Tensor], config: dict[str, Any], module: str
) -> QuantizedTensor | Fp8Tensor:
    """The format's tensors → codes, scales and zeros. Raises InputError for other layouts."""
    grid = _scheme_of(module, config)
    scales = tensors["weight_scale"].float()
    scales = scales.view(-1, 1) if scales.ndim < 2 else scales
    if isinstance(grid, Fp8Scheme):
        return Fp8Tensor(tensors["weight"], scales)
    if "weight" in tensors:
        codes = tensors["weight"].to(torch.int16).add_(grid.middle).to(torch.uint8)
    else:
        columns = int(tensors["weight_shape"][1])
        codes = _unpack(tensors["weight_packed"].t().contiguous(), grid.bits, columns)
        codes = codes.t().contiguous()
    rows = codes.shape[0]
    scales = scales.expand(rows, -1)
    if grid.symmetric:
        zeros = torch.full(scales.shape, grid.middle, dtype=torch.uint8)
    else:
        zeros = _unpack(tensors["weight_zero_point"], grid.bits, rows)
    permuted = _group_of(module, config)["weights"].get("actorder") == "group"
    if permuted and "weight_g_idx" not in tensors:
        raise InputError("has permuted groups, but no weight_g_idx", subject=module)
    groups = tensors["weight_g_idx"].to(torch.int64) if "weight_g_idx" in tensors else None
    if groups is not None and bool((groups[1:] >= groups[:-1]).all()):
        groups = None  # in order, or unset
    return QuantizedTensor(grid, codes, scales, zeros, groups)


def _unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """int32 (words, m) → the first ``count`` codes along dimension 0, uint8 (count, m).

    Older writers don't let a code straddle two words; newer ones do.
    """
    if 32 % bits and len(packed) == -(-count // (32 // bits)):
        unsigned = packed.to(torch.int64) & 0xFFFFFFFF
        codes = torch.stack([unsigned >> shift for shift in range(0, 32 - bits + 1, bits)], dim=1)
        return (codes.flatten(0, 1)[:count] & ((1 << bits) - 1)).to(torch.uint8)
    whole = -(-len(packed) // bits) * bits  # a run of words that ends on a boundary of codes
    padded = torch.nn.functional.pad(packed, (0, 0, 0, whole - len(packed)))
    return words.unpack(padded if 32 % bits else packed, bits)[:count]


def scheme(
    shape: Callable[[str], tuple[int, ...]],
    read: Callable[[str], Tensor],
    config: dict[str, Any],
    module: str,
) -> Scheme:
    """What a packed linear is rounded to. Raises InputError for what isn't read."""
    return _scheme_of(module, config)


def weight_shape(
    shape: Callable[[str], tuple[int, ...]], read: Callable[[str], Tensor]
) -> tuple[int, ...]:
    """(out, in) of a packed linear, from the shape and value of its tensors by suffix."""
    try:
        return shape("weight")
    except KeyError:
        return tuple(read("weight_shape").tolist())


def input_rounding(
    module: str, config: dict[str, Any], read: Callable[[str], Tensor]
) -> Rounding | None:
    """What engines do to the inputs of a packed linear before they multiply; None for nothing."""
    scheme = _scheme_of(module, config)
    if not scheme.rounds_inputs:
        return None
    rounding = round_fp8 if isinstance(scheme, Fp8Scheme) else round_int8
    inputs = _group_of(module, config)["input_activations"]
    return rounding if inputs["dynamic"] else partial(rounding, scale=read("input_scale").float())


def config(default: Scheme, grids: dict[str, Scheme], skipped: list[str]) -> dict[str, Any]:
    """``quantization_config`` of config.json: a group for each grid.

    A single one is for every ``Linear``. Where there are several, each names its modules: vLLM
    looks for the class of a fused linear before it looks for its parts.
    """
    modules: dict[Scheme, list[str]] = {}
    for name, grid in grids.items():
        modules.setdefault(grid, []).append(name)
    single = len(modules) < 2
    groups = {
        f"group_{number}": _group(grid, ["Linear"] if single else names)
        for number, (grid, names) in enumerate(modules.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": next(iter(groups.values()))["format"],
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": skipped,
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": _VERSION,
        "config_groups": groups,
    }


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    layout, inputs = "pack-quantized", None
    if isinstance(scheme, Fp8Scheme):
        layout, weights = "float-quantized", _arguments(8, "float", "channel")
    else:
        strategy = "channel" if scheme.group_size == -1 else "group"
        weights = _arguments(scheme.bits, "int", strategy)
        weights["symmetric"] = scheme.symmetric
        weights["group_size"] = None if scheme.group_size == -1 else scheme.group_size
        layout = "int-quantized" if scheme.rounds_inputs else layout
    if layout != "pack-quantized":
        inputs = _arguments(8, weights["type"], "token") | {"dynamic": True, "observer": None}
    return {
        "targets": targets,
        "format": layout,
        "input_activations": inputs,
        "output_activations": None,
        "weights": weights,
    }


def _arguments(bits: int, type: str, strategy: str) -> dict[str, Any]:
    """One side of a group; readers of different age refuse other keys, or miss absent ones."""
    return {
        "num_bits": bits,
        "type": type,
        "symmetric": True,
        "strategy": strategy,
        "group_size": None,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def _scheme_of(module: str, config: dict[str, Any]) -> Scheme:
    """What a module is quantized to. Raises InputError for a scheme that isn't read."""
    group = _group_of(module, config)
    weights, inputs = group["weights"], group.get("input_activations")
    layout = group.get("format") or config["format"]
    bits, strategy = weights["num_bits"], weights["strategy"]
    if layout == "pack-quantized" and inputs is None and 2 <= bits <= 8:
        per_row = strategy == "channel"
        if per_row or strategy == "group":
            return Grid(bits, -1 if per_row else weights["group_size"], weights["symmetric"])
    static = inputs is not None and not inputs["dynamic"]
    fitting = bits == 8 and weights["symmetric"] and strategy in ("channel", "tensor")
    if inputs is not None:
        by = "tensor" if static else "token"
        fitting &= inputs["num_bits"] == 8 and inputs["symmetric"] and inputs["strategy"] == by
    if fitting and layout == "float-quantized" and weights["type"] == "float":
        return Fp8Scheme(strategy == "channel", inputs is not None, static)
    if fitting and layout == "int-quantized" and weights["type"] == "int":
        return Grid(8, -1, symmetric=True, rounds_inputs=inputs is not None)
    what = f", inputs {inputs['num_bits']} bits by {inputs['strategy']}" if inputs else ""
    raise InputError(
        f"is stored as {layout} ({bits} bits by {strategy}{what}), which can't be read",
        subject=module,
        fix="Can be read: pack-quantized by group or channel; int-quantized and float-quantized "
        "of 8 bits by channel or tensor, with inputs by token, static or left alone.",
    )


def _group_of(module: str, config: dict[str, Any]) -> dict[str, Any]:
    """The group whose targets name a module; names go before patterns, patterns before classes."""

    def rank(target: str) -> int | None:
        if target.startswith("re:"):
            return 1 if re.match(target[3:], module) else None
        return {module: 0, "Linear": 2}.get(target)

    found = [
        (place, number, group)
        for number, group in enumerate(config["config_groups"].values())
        for place in map(rank, group["targets"])
        if place is not None
    ]
    if not found:
        raise InputError("is in none of the config_groups of config.json", subject=module)
    result: dict[str, Any] = min(found, key=lambda item: item[:2])[2]
    return result
