"""The compressed-tensors format, as llm-compressor writes it and vLLM and transformers read it.

Everything is stored in the order of the weight, (out, in), in one of three layouts.

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

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantkit.base.errors import InputError
from quantkit.formats import words
from quantkit.formats.compressed_tensors_config import (
    group_of_module,
    group_of_scheme,
    scheme_of_module,
)
from quantkit.formats.format import (
    Contents,
    Dialect,
    Loading,
    SafetensorsFormat,
    StoredLinear,
    Unreadable,
    expect,
)
from quantkit.methods.fp8 import Fp8Scheme, Fp8Tensor
from quantkit.methods.grids import Grid, Quantized, QuantizedTensor
from quantkit.methods.inputs import InputRounding, round_fp8, round_int8

# With other numbers of bits a code straddles two words for some readers, and not for older ones.
_BITS = (2, 4, 8)
_VERSION = "0.17.0"  # of the layout


class CompressedTensorsFormat(SafetensorsFormat):
    """Grids of 2, 4 or 8 bits, and FP8, each with a group of modules in config.json."""

    name = "compressed-tensors"
    holds = (Grid, Fp8Scheme)
    suffixes = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
    markers = ("weight_scale",)
    read_suffixes = (*suffixes, "weight_g_idx", "input_scale", "input_zero_point")
    group_index = "weight_g_idx"
    needed_by_transformers = ("compressed-tensors",)

    def check_scheme(
        self, name: str, shape: tuple[int, int], scheme: object, default: object
    ) -> None:
        super().check_scheme(name, shape, scheme, default)
        if not isinstance(scheme, Grid):
            return
        if scheme.bits not in _BITS:
            raise InputError(
                f"the compressed-tensors format holds {', '.join(map(str, _BITS))} bits, "
                f"not {scheme.bits}",
                where=name,
                fix="Choose one of these, format: gptq (2, 3, 4 or 8 bits), or format: gguf (all, "
                "by the type of a mix).",
            )
        if scheme.rounds_inputs:
            return
        per_word = 32 // scheme.bits
        for size, what in ((shape[1], "inputs"), (0 if scheme.symmetric else shape[0], "outputs")):
            if size % per_word:
                raise InputError(
                    f"{size} {what} aren't divisible by {per_word}, the codes that share a word",
                    where=name,
                    fix="Skip this module (overrides: match, skip: true).",
                )

    def nbytes(self, shape: tuple[int, int], scheme: object, dtype: torch.dtype) -> int:
        out_features, in_features = shape
        if isinstance(scheme, Fp8Scheme) or expect(scheme, Grid).rounds_inputs:
            return out_features * in_features + out_features * dtype.itemsize
        grid = expect(scheme, Grid)
        groups = in_features // grid.columns(in_features)
        zeros = 0 if grid.symmetric else out_features * groups * grid.bits // 8
        codes = out_features * in_features * grid.bits // 8
        return codes + zeros + out_features * groups * dtype.itemsize + 2 * 8

    def pack(self, tensor: Quantized, dtype: torch.dtype) -> dict[str, Tensor]:
        if isinstance(tensor, Fp8Tensor):
            return {"weight": tensor.codes, "weight_scale": tensor.scales.to(dtype)}
        tensor = expect(tensor, QuantizedTensor)
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

    def unpack(self, linear: StoredLinear) -> QuantizedTensor | Fp8Tensor:
        grid = self.scheme(linear)
        scales = linear.read("weight_scale").float()
        scales = scales.view(-1, 1) if scales.ndim < 2 else scales
        if isinstance(grid, Fp8Scheme):
            return Fp8Tensor(linear.read("weight"), scales)
        if "weight" in linear.suffixes:
            codes = linear.read("weight").to(torch.int16).add_(grid.middle).to(torch.uint8)
        else:
            columns = int(linear.read("weight_shape")[1])
            packed = linear.read("weight_packed").t().contiguous()
            codes = _unpack(packed, grid.bits, columns).t().contiguous()
        rows = codes.shape[0]
        scales = scales.expand(rows, -1)
        if grid.symmetric:
            zeros = torch.full_like(scales, grid.middle, dtype=torch.uint8)
        else:
            zeros = _unpack(linear.read("weight_zero_point"), grid.bits, rows)
        return QuantizedTensor(grid, codes, scales, zeros, _groups(linear))

    def scheme(self, linear: StoredLinear) -> Grid | Fp8Scheme:
        """The grid or FP8, by config.json: the tensors' shapes don't tell."""
        return scheme_of_module(linear.module, linear.settings)

    def weight_shape(self, linear: StoredLinear) -> tuple[int, ...]:
        if "weight" in linear.suffixes:
            return linear.shape("weight")
        return tuple(linear.read("weight_shape").tolist())

    def input_rounding(self, linear: StoredLinear) -> InputRounding | None:
        scheme = self.scheme(linear)
        if not scheme.rounds_inputs:
            return None
        rounding = round_fp8 if isinstance(scheme, Fp8Scheme) else round_int8
        if group_of_module(linear.module, linear.settings)["input_activations"]["dynamic"]:
            return rounding
        return partial(rounding, scale=linear.read("input_scale").float())

    def config(
        self,
        default: object,
        schemes: Mapping[str, object],
        skipped: Sequence[str],
        dtype: torch.dtype,
    ) -> dict[str, Any]:
        """``quantization_config`` of config.json: a group for each scheme."""
        modules: dict[object, list[str]] = {}
        for name, scheme in schemes.items():
            modules.setdefault(scheme, []).append(name)
        # A single group is for every Linear. Where there are several, each names its modules:
        # vLLM looks for the class of a fused linear before it looks for its parts.
        single = len(modules) < 2
        groups = {
            f"group_{number}": group_of_scheme(scheme, ["Linear"] if single else names)
            for number, (scheme, names) in enumerate(modules.items())
        }
        return {
            "quant_method": "compressed-tensors",
            "format": next(iter(groups.values()))["format"],
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "ignore": list(skipped),
            "kv_cache_scheme": None,
            "sparsity_config": {},
            "transform_config": {},
            "version": _VERSION,
            "config_groups": groups,
        }

    def dialect(self, quantization: Mapping[str, Any]) -> Dialect:
        sparsity = quantization.get("sparsity_config") or {}
        if sparsity.get("format", "dense") != "dense":
            raise Unreadable(f"compressed-tensors ({sparsity['format']})")
        if quantization.get("transform_config"):
            raise Unreadable("compressed-tensors (with rotations at run time)")
        version = quantization.get("version")
        writer = f"compressed-tensors {version}" if version else None
        layout = str(quantization.get("format"))
        return Dialect("compressed-tensors", layout, dict(quantization), writer)

    def loading(self, contents: Contents) -> tuple[Loading, ...]:
        grids = [scheme for scheme in contents.schemes if isinstance(scheme, Grid)]
        floats = [scheme for scheme in contents.schemes if isinstance(scheme, Fp8Scheme)]
        packed = contents.layout == "pack-quantized"
        transformers = Loading("transformers", "yes", "with compressed-tensors")
        if packed and any(not grid.symmetric for grid in grids):
            why = "with compressed-tensors 0.17; 0.18 to 0.20 fail on asymmetric codes"
            transformers = Loading("transformers", "yes", why)
        if packed and any(grid.bits != 4 for grid in grids):
            return transformers, Loading("vLLM", "no", "on CPU: 4 bits only; on a GPU untried")
        if any(not (scheme.per_row and scheme.rounds_inputs) for scheme in floats):
            why = "on CPU: FP8 by channel with inputs by token only; on a GPU untried"
            return transformers, Loading("vLLM", "no", why)
        if contents.permuted:
            return transformers, Loading("vLLM", "no", "permuted groups")
        return transformers, Loading("vLLM", "yes")


def _groups(linear: StoredLinear) -> Tensor | None:
    """The group of each column, int64 (in), unless they are consecutive."""
    if "weight_g_idx" not in linear.suffixes:
        group = group_of_module(linear.module, linear.settings)
        if group["weights"].get("actorder") == "group":
            raise InputError("has permuted groups, but no weight_g_idx", subject=linear.module)
        return None
    groups = linear.read("weight_g_idx").to(torch.int64)
    # In order, or never set: then it is -1 throughout.
    return None if bool((groups[1:] >= groups[:-1]).all()) else groups


def _unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """int32 (words, m) → the first ``count`` codes along dimension 0, uint8 (count, m)."""
    # Older writers don't let a code straddle two words; newer ones do. The number of words tells.
    if 32 % bits and len(packed) == -(-count // (32 // bits)):
        unsigned = packed.to(torch.int64) & 0xFFFFFFFF
        codes = torch.stack([unsigned >> shift for shift in range(0, 32 - bits + 1, bits)], dim=1)
        return (codes.flatten(0, 1)[:count] & ((1 << bits) - 1)).to(torch.uint8)
    # ``words`` reads runs of words that end on a boundary of codes.
    whole = -(-len(packed) // bits) * bits
    padded = torch.nn.functional.pad(packed, (0, 0, 0, whole - len(packed)))
    return words.unpack(padded if 32 % bits else packed, bits)[:count]
