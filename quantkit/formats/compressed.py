"""The compressed-tensors format, as llm-compressor writes it and vLLM and transformers read it.

Everything lies as the weight did, (out, in). ``pack-quantized`` has, per linear, ``weight_packed``
int32 (out, in·bits/32), packed along in, the first code in the low bits; ``weight_scale`` (out,
groups) in the model's dtype; ``weight_shape`` int64 (2,); and for asymmetric grids
``weight_zero_point`` int32 (out·bits/32, groups), packed along out. What is stored is the signed
code plus 2^(bits-1), which is the code of ``Grid``.

Reference: compressed_tensors' ``compressors/pack_quantized`` and ``quantization/quant_args.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import InputError
from quantkit.formats import bits as words
from quantkit.quantizers.grid import Grid, QuantizedTensor

SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
MARKER = "weight_scale"
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
            mend="Choose one of these, format: gptq (2, 3, 4 or 8 bits), or format: gguf (all, by "
            "the type of a mix).",
        )
    per_word = 32 // grid.bits
    for size, what in ((shape[1], "inputs"), (0 if grid.symmetric else shape[0], "outputs")):
        if size % per_word:
            raise InputError(
                f"{size} {what} aren't divisible by {per_word}, the codes that share a word",
                where=name,
                mend="Skip this module (overrides: match, skip: true).",
            )


def nbytes(shape: tuple[int, int], grid: Grid, dtype: torch.dtype) -> int:
    """Bytes of one packed linear of a model in ``dtype``."""
    out_features, in_features = shape
    groups = in_features // grid.columns(in_features)
    zeros = 0 if grid.symmetric else out_features * groups * grid.bits // 8
    codes = out_features * in_features * grid.bits // 8
    return codes + zeros + out_features * groups * dtype.itemsize + 2 * 8


def pack(tensor: QuantizedTensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Codes, scales and zeros → the format's tensors, for a model in ``dtype``."""
    bits = tensor.grid.bits
    parts = {
        "weight_packed": words.pack(tensor.codes.t().contiguous(), bits).t().contiguous(),
        "weight_scale": tensor.scales.to(dtype),
        "weight_shape": torch.tensor(tensor.shape, dtype=torch.int64),
    }
    if not tensor.grid.symmetric:
        parts["weight_zero_point"] = words.pack(tensor.zeros, bits)
    return parts


def unpack(tensors: dict[str, Tensor], config: dict[str, Any], module: str) -> QuantizedTensor:
    """The format's tensors → codes, scales and zeros. Raises InputError for what isn't affine."""
    grid = _grid_of(module, config)
    codes = words.unpack(tensors["weight_packed"].t().contiguous(), grid.bits).t().contiguous()
    scales = tensors["weight_scale"].float()
    if grid.symmetric:
        zeros = torch.full(scales.shape, grid.middle, dtype=torch.uint8)
    else:
        zeros = words.unpack(tensors["weight_zero_point"], grid.bits)
    return QuantizedTensor(grid, codes, scales, zeros)


def weight_shape(
    shape: Callable[[str], tuple[int, ...]], read: Callable[[str], Tensor]
) -> tuple[int, ...]:
    """(out, in) of a packed linear, from the shape and value of its tensors by suffix."""
    return tuple(read("weight_shape").tolist())


def config(default: Grid, grids: dict[str, Grid], skipped: list[str]) -> dict[str, Any]:
    """``quantization_config`` of config.json: a group for each grid.

    A single one is for every ``Linear``. Where there are several, each names its modules: vLLM
    looks for the class of a fused linear before it looks for its parts.
    """
    modules: dict[Grid, list[str]] = {}
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


def has_int4(config: dict[str, Any]) -> bool:
    """Whether a ``quantization_config`` says that some linears hold packed 4-bit codes."""
    return any(
        group["format"] == "pack-quantized" and group["weights"]["num_bits"] == 4
        for group in config.get("config_groups", {}).values()
    )


def _group(grid: Grid, targets: list[str]) -> dict[str, Any]:
    return {
        "targets": targets,
        "format": "pack-quantized",
        "input_activations": None,
        "output_activations": None,
        "weights": {
            "num_bits": grid.bits,
            "type": "int",
            "symmetric": grid.symmetric,
            "strategy": "channel" if grid.group_size == -1 else "group",
            "group_size": None if grid.group_size == -1 else grid.group_size,
            "block_structure": None,
            "dynamic": False,
            "actorder": None,
            "observer": "minmax",
            "observer_kwargs": {},
        },
    }


def _grid_of(module: str, config: dict[str, Any]) -> Grid:
    group = _group_of(module, config)
    weights = group["weights"]
    layout = group.get("format") or config["format"]
    if layout != "pack-quantized" or weights.get("actorder") == "group":
        what = layout if layout != "pack-quantized" else f"{layout} with permuted groups"
        raise InputError(f"is laid out as {what}, which isn't supported", where=module)
    size = weights.get("group_size")
    return Grid(weights["num_bits"], -1 if size is None else size, weights["symmetric"])


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
        raise InputError("is in none of the config_groups of config.json", where=module)
    result: dict[str, Any] = min(found, key=lambda item: item[:2])[2]
    return result
