"""The GPTQ format, as AutoGPTQ wrote it and vLLM and transformers read it.

Per linear: ``qweight`` int32 (in·bits/32, out), packed along in, the first row in the low bits;
``qzeros`` int32 (groups, out·bits/32), packed along out, holding zero point - 1 (version 1, which
is written here) or the zero point (version 2); ``scales`` fp16 (groups, out); ``g_idx`` int32
(in), the group of each input feature. What is written has static activation order, so g_idx is
k // group_size and ``desc_act`` is false. Other tools' permuted groups are read too. Bits and
groups are read off the tensors' shapes, since ``dynamic`` settings may change them by module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantkit.base.errors import InputError
from quantkit.formats import auto_round, words
from quantkit.formats.format import (
    Contents,
    Dialect,
    Loading,
    SafetensorsFormat,
    StoredLinear,
    Unreadable,
    expect,
    first_setting,
    signature,
)
from quantkit.methods.grids import Grid, Quantized, QuantizedTensor

_BITS = (2, 3, 4, 8)
_VLLM_GROUPS = (-1, 32, 64, 128)


class GptqFormat(SafetensorsFormat):
    """Grids of 2, 3, 4 or 8 bits, with exceptions of other bits and group sizes."""

    name = "gptq"
    readable = "gptq (v1 and v2)"
    holds = (Grid,)
    lowest_zero = 1  # version 1 stores z - 1: see pack
    records = ("damp_percent",)
    suffixes = ("qweight", "qzeros", "scales", "g_idx")
    markers = ("qweight",)
    read_suffixes = suffixes
    group_index = "g_idx"
    old_config = "quantize_config.json"
    needed_by_transformers = ("gptqmodel", "optimum")

    def check_scheme(
        self, name: str, shape: tuple[int, int], scheme: object, default: object
    ) -> None:
        super().check_scheme(name, shape, scheme, default)
        grid = expect(scheme, Grid)
        if grid.bits not in _BITS:
            raise InputError(
                f"the gptq format holds {', '.join(map(str, _BITS))} bits, not {grid.bits}",
                where=name,
                fix="Choose one of these, or skip this module.",
            )
        if grid.rounds_inputs:
            raise self.refusal(name, grid)
        if grid.symmetric != expect(default, Grid).symmetric:
            raise InputError("the gptq format holds one symmetry for all modules", where=name)
        if shape[0] % 32 or shape[1] % 32:
            raise InputError(
                f"shape {shape[0]} x {shape[1]} isn't divisible by 32, as gptq kernels need",
                where=name,
                fix="Skip this module (overrides: match, skip: true).",
            )

    def nbytes(self, shape: tuple[int, int], scheme: object, dtype: torch.dtype) -> int:
        out_features, in_features = shape
        grid = expect(scheme, Grid)
        groups = in_features // grid.columns(in_features)
        codes = out_features * in_features * grid.bits // 8
        zeros = groups * out_features * grid.bits // 8
        return codes + zeros + groups * out_features * 2 + in_features * 4

    def pack(self, tensor: Quantized, dtype: torch.dtype) -> dict[str, Tensor]:
        tensor = expect(tensor, QuantizedTensor)
        bits = tensor.grid.bits
        in_features = tensor.codes.shape[1]
        # Stored as z - 1, which for z = 0 is the highest code. Readers add 1 to all codes of a word
        # at once, and would carry from there into the neighbour: lowest_zero rules that out.
        zeros = tensor.zeros.t() - 1
        order = torch.arange(in_features, device=tensor.codes.device)
        groups = order // tensor.grid.columns(in_features)
        return {
            "qweight": words.pack(tensor.codes.t().contiguous(), bits),
            "qzeros": words.pack(zeros.t().contiguous(), bits).t().contiguous(),
            "scales": tensor.scales.t().to(torch.float16).contiguous(),
            "g_idx": groups.to(torch.int32),
        }

    def unpack(self, linear: StoredLinear) -> QuantizedTensor:
        grid = self.scheme(linear)
        codes = words.unpack(linear.read("qweight"), grid.bits).t().contiguous()
        return QuantizedTensor(
            grid,
            codes,
            linear.read("scales").t().float().contiguous(),
            _zeros(linear.read("qzeros"), grid, linear.settings),
            _groups(linear, codes.shape[1], grid),
        )

    def scheme(self, linear: StoredLinear) -> Grid:
        """The grid, by the shapes of the tensors."""
        out_features, in_features = self.weight_shape(linear)
        groups = linear.shape("scales")[0]
        bits = linear.shape("qzeros")[1] * 32 / out_features
        fitting = linear.shape("scales") == (groups, out_features)
        fitting &= linear.shape("qzeros")[0] == groups
        if bits not in range(2, 9) or not fitting:
            raise InputError(
                "its qweight, qzeros and scales don't belong together", where=linear.module
            )
        size = int(linear.settings.get("group_size") or -1)
        if groups != (1 if size == -1 else -(-in_features // size)):
            size = -(-in_features // groups)  # an exception to what config.json states for all
        return Grid(int(bits), size, bool(linear.settings.get("sym", True)), self.lowest_zero)

    def weight_shape(self, linear: StoredLinear) -> tuple[int, ...]:
        words_in, out_features = linear.shape("qweight")
        # Words of codes are in · bits / 32, words of zero points out · bits / 32: bits cancel out.
        return out_features, words_in * out_features // linear.shape("qzeros")[1]

    def config(
        self,
        default: object,
        schemes: Mapping[str, object],
        skipped: Sequence[str],
        dtype: torch.dtype,
    ) -> dict[str, Any]:
        base = expect(default, Grid)
        # Exceptions are stated twice: transformers reads modules_in_block_to_quantize, vLLM and
        # GPTQModel read dynamic (regexes: "-:" skips, "+:" changes).
        dynamic: dict[str, Any] = {
            f"-:^{re.escape(name)}$": {} for name in skipped if name != "lm_head"
        }
        for name, scheme in schemes.items():
            if scheme != default:
                grid = expect(scheme, Grid)
                changes = {"bits": grid.bits, "group_size": grid.group_size}
                dynamic[f"+:^{re.escape(name)}$"] = changes
        result: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": base.bits,
            "group_size": base.group_size,
            "desc_act": False,
            "sym": base.symmetric,
            "lm_head": False,
            "checkpoint_format": "gptq",
            "true_sequential": False,
        }
        if dynamic:
            result["modules_in_block_to_quantize"] = [list(schemes)]
            result["dynamic"] = dynamic
        return result

    def other_files(self, config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        return {"quantize_config.json": config}

    def dialect(self, quantization: Mapping[str, Any]) -> Dialect:
        version = first_setting(quantization, "checkpoint_format", "format", default="gptq")
        if quantization.get("is_marlin_format"):
            version = "marlin"
        if version not in ("gptq", "gptq_v2"):
            raise Unreadable(f"gptq ({version})")
        word = first_setting(quantization, "pack_dtype", default="int32")
        if word != "int32":
            raise Unreadable(f"gptq (packed in {word})")
        settings = {**quantization, "checkpoint_format": version}
        variant = "v2" if version == "gptq_v2" else "v1"
        return Dialect("gptq", variant, settings, signature(quantization))

    def loading(self, contents: Contents) -> tuple[Loading, ...]:
        if contents.auto_round:
            return auto_round.LOADING
        grids = [scheme for scheme in contents.schemes if isinstance(scheme, Grid)]
        return _transformers(grids, contents.permuted), _vllm(grids, contents)


def _transformers(grids: Sequence[Grid], permuted: bool) -> Loading:
    if permuted:
        return Loading("transformers", "untried", "permuted groups; needs gptqmodel")
    if any(grid.bits == 4 and grid.group_size == -1 for grid in grids):
        return Loading("transformers", "untried", "4 bits, a group a row: may fail on CPU")
    return Loading("transformers", "yes", "with optimum and gptqmodel")


def _vllm(grids: Sequence[Grid], contents: Contents) -> Loading:
    bits = {grid.bits for grid in grids}
    reasons = [
        (any(not grid.symmetric for grid in grids), "asymmetric GPTQ"),
        (contents.permuted, "permuted groups (desc_act)"),
        (not bits <= {4, 8}, f"{min(bits, default=0)} bits"),
        (any(grid.group_size not in _VLLM_GROUPS for grid in grids), "groups of another size"),
    ]
    refused = [why for holds, why in reasons if holds]
    if refused:
        return Loading("vLLM", "no", ", ".join(refused))
    by_32 = all(rows % 32 == 0 and columns % 32 == 0 for rows, columns in contents.shapes)
    if bits == {4} and by_32:
        return Loading("vLLM", "yes")
    why = "8 bits" if 8 in bits else "widths must be divisible by 32"
    return Loading("vLLM", "no", f"on CPU: {why}; on a GPU untried")


def _zeros(packed: Tensor, grid: Grid, settings: Mapping[str, Any]) -> Tensor:
    """Zero points of any version and writer, uint8 (out, groups)."""
    bits = grid.bits
    if settings.get("checkpoint_format") == "gptq_v2":
        return words.unpack(packed.t().contiguous(), bits)
    if _by_words(settings) and 32 % bits == 0:
        ones = sum(1 << shift for shift in range(0, 32, bits))
        return words.unpack((packed.to(torch.int64) + ones).t().contiguous(), bits)
    # Other writers let z = 0 wrap to the highest code, each by itself.
    return (words.unpack(packed.t().contiguous(), bits) + 1) & grid.levels


def _by_words(settings: Mapping[str, Any]) -> bool:
    """Whether the writer subtracted 1 in whole words, so that z = 0 borrowed from the next code."""
    return "gptqmodel" in str((settings.get("meta") or {}).get("quantizer"))


def _groups(linear: StoredLinear, in_features: int, grid: Grid) -> Tensor | None:
    """The group of each column, int64 (in), unless they are consecutive and of one size."""
    count = linear.shape("scales")[0]
    size = in_features if grid.group_size == -1 else grid.group_size
    consecutive = torch.arange(in_features) // size
    groups = consecutive
    if "g_idx" in linear.suffixes:
        groups = linear.read("g_idx").to(torch.int64)
        consecutive = consecutive.to(groups.device)
    if groups.shape != (in_features,) or int(groups.min()) < 0 or int(groups.max()) >= count:
        raise InputError(f"its g_idx doesn't name {count} groups of columns", where=linear.module)
    return None if torch.equal(groups, consecutive) and in_features % count == 0 else groups
