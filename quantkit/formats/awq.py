"""The AWQ GEMM format, as AutoAWQ wrote it and vLLM and transformers read it.

Per linear: ``qweight`` int32 (in, out/8), ``qzeros`` int32 (groups, out/8), ``scales`` fp16
(groups, out). Eight output columns share a word; nibble i holds column [0,2,4,6,1,3,5,7][i].
Always 4 bits, always with zero points (symmetric codes have zero point 8).
"""

from __future__ import annotations

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

# Kernels convert two nibbles that are 16 bits apart at once: those of neighbours.
_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
_INVERSE = [_ORDER.index(i) for i in range(8)]


class AwqFormat(SafetensorsFormat):
    """4-bit grids of one group size in all modules."""

    name = "awq"
    readable = "awq (gemm)"
    holds = (Grid,)
    suffixes = ("qweight", "qzeros", "scales")
    markers = ("qweight",)
    read_suffixes = suffixes
    old_config = "quant_config.json"
    needed_by_transformers = ("gptqmodel", "accelerate")

    def check_scheme(
        self, name: str, shape: tuple[int, int], scheme: object, default: object
    ) -> None:
        super().check_scheme(name, shape, scheme, default)
        grid, default = expect(scheme, Grid), expect(default, Grid)
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
        if grid.rounds_inputs:
            raise self.refusal(name, grid)
        if shape[0] % 8:
            raise InputError(f"{shape[0]} outputs aren't divisible by 8, as awq needs", where=name)

    def nbytes(self, shape: tuple[int, int], scheme: object, dtype: torch.dtype) -> int:
        groups = shape[1] // expect(scheme, Grid).columns(shape[1])
        return shape[0] * shape[1] // 2 + groups * shape[0] // 2 + groups * shape[0] * 2

    def pack(self, tensor: Quantized, dtype: torch.dtype) -> dict[str, Tensor]:
        tensor = expect(tensor, QuantizedTensor)
        return {
            "qweight": _pack(tensor.codes.t()),
            "qzeros": _pack(tensor.zeros.t()),
            "scales": tensor.scales.t().to(torch.float16).contiguous(),
        }

    def unpack(self, linear: StoredLinear) -> QuantizedTensor:
        return QuantizedTensor(
            self.scheme(linear),
            _unpack(linear.read("qweight")).t().contiguous(),
            linear.read("scales").t().float().contiguous(),
            _unpack(linear.read("qzeros")).t().contiguous(),
        )

    def scheme(self, linear: StoredLinear) -> Grid:
        """The grid, by the shapes of the tensors."""
        out_features, in_features = self.weight_shape(linear)
        groups = linear.shape("scales")[0]
        expected = (groups, out_features), (groups, out_features // 8)
        fitting = (linear.shape("scales"), linear.shape("qzeros")) == expected
        if not fitting or in_features % groups:
            raise InputError(
                "its qweight, qzeros and scales don't belong together", where=linear.module
            )
        settings = linear.settings
        # One group may be a row, or a group size that is the row's width; config.json decides.
        per_row = groups == 1 and settings.get("group_size", -1) == -1
        size = -1 if per_row else in_features // groups
        return Grid(4, size, not settings.get("zero_point", True))

    def weight_shape(self, linear: StoredLinear) -> tuple[int, ...]:
        in_features, words_out = linear.shape("qweight")
        return words_out * 8, in_features

    def config(
        self,
        default: object,
        schemes: Mapping[str, object],
        skipped: Sequence[str],
        dtype: torch.dtype,
    ) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": expect(default, Grid).group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(skipped),
        }

    def dialect(self, quantization: Mapping[str, Any]) -> Dialect:
        version = first_setting(
            quantization, "version", "checkpoint_format", "format", default="gemm"
        )
        bits = int(first_setting(quantization, "bits", "w_bit", default="4"))
        if version != "gemm" or bits != 4:
            raise Unreadable(f"awq ({version}, {bits} bits)")
        settings = dict(quantization)
        settings.setdefault("group_size", quantization.get("q_group_size", -1))
        return Dialect("awq", "gemm", settings, signature(quantization))

    def loading(self, contents: Contents) -> tuple[Loading, ...]:
        if contents.auto_round:
            return auto_round.LOADING
        vllm = Loading("vLLM", "yes")
        if not all(rows % 32 == 0 and columns % 32 == 0 for rows, columns in contents.shapes):
            vllm = Loading("vLLM", "no", "on CPU: widths must be divisible by 32; on a GPU untried")
        return Loading("transformers", "yes", "with gptqmodel and accelerate"), vllm


def _pack(codes: Tensor) -> Tensor:
    """uint8 (n, m) → int32 (n, m/8), packed along dimension 1 in AWQ's order."""
    ordered = codes.unflatten(1, (-1, 8))[..., _ORDER].flatten(1)
    return words.pack(ordered.t().contiguous(), 4).t().contiguous()


def _unpack(packed: Tensor) -> Tensor:
    ordered = words.unpack(packed.t().contiguous(), 4).t()
    return ordered.unflatten(1, (-1, 8))[..., _INVERSE].flatten(1)
