"""bitsandbytes' checkpoints, as transformers' save_pretrained writes and loads them.

4 bits, per linear: ``weight`` uint8 (out·in/2, 1), the even element in the high nibble;
``weight.absmax``, ``weight.quant_map``, with double quantization ``weight.nested_absmax`` and
``weight.nested_quant_map``; and ``weight.quant_state.bitsandbytes__nf4`` (or ``fp4``), JSON as
bytes. Other tools may store the codes as another dtype of the same bytes.

8 bits (LLM.int8, read only): ``weight`` int8 (out, in), ``SCB`` fp32 (out), the rows' absolute
maxima, so that w = q · SCB / 127; ``weight_format`` uint8, 0 for codes in the weight's own order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantkit.base.errors import InputError, not_installed
from quantkit.base.names import dtype_name
from quantkit.formats.format import (
    Contents,
    Dialect,
    Loading,
    SafetensorsFormat,
    StoredLinear,
    expect,
)
from quantkit.methods.grids import Grid, Quantized, QuantizedTensor
from quantkit.methods.nf4 import Nf4Scheme, Nf4Tensor

_STATES = tuple(f"weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
_MAXIMA = "SCB"
_INT8 = Grid(8, -1, symmetric=True)


class BitsandbytesFormat(SafetensorsFormat):
    """NF4. FP4 and LLM.int8 of other tools are read too."""

    name = "bitsandbytes"
    holds = (Nf4Scheme,)
    without_experts = "transformers, which alone loads it, keeps all experts in one parameter"
    suffixes = (
        "weight",
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        _STATES[0],
    )
    markers = (*_STATES, _MAXIMA)
    read_suffixes = (*suffixes, _STATES[1], _MAXIMA, "weight_format")
    needed_by_transformers = ("bitsandbytes", "accelerate")

    def nbytes(self, shape: tuple[int, int], scheme: object, dtype: torch.dtype) -> int:
        nf4 = expect(scheme, Nf4Scheme)
        count = shape[0] * shape[1]
        blocks = -(-count // nf4.block_size)
        maxima = blocks + -(-blocks // 256) * 4 + 256 * 4 if nf4.double_quant else blocks * 4
        return -(-count // 2) + maxima + 16 * 4 + 200  # about what the JSON takes

    def pack(self, tensor: Quantized, dtype: torch.dtype) -> dict[str, Tensor]:
        tensor = expect(tensor, Nf4Tensor)
        state = tensor.state.as_dict(packed=True)
        return {"weight": tensor.packed, **{f"weight.{key}": value for key, value in state.items()}}

    def unpack(self, linear: StoredLinear) -> Quantized:
        """Codes and quantization state, or codes on an 8-bit grid."""
        if _MAXIMA in linear.suffixes:
            return _unpack_int8(linear)
        try:
            from bitsandbytes.functional import QuantState
        except ImportError as error:
            raise not_installed("bitsandbytes", "nf4") from error
        parts = {
            suffix.removeprefix("weight."): linear.read(suffix)
            for suffix in linear.suffixes
            if suffix != "weight"
        }
        codes = linear.read("weight").view(torch.uint8).reshape(-1, 1)
        state = QuantState.from_dict(parts, device=codes.device)
        return Nf4Tensor(codes, state, tuple(state.shape))

    def scheme(self, linear: StoredLinear) -> Grid | Nf4Scheme:
        state = _state(linear)
        if state is None:
            return _INT8
        return Nf4Scheme(state["blocksize"], "nested_blocksize" in state, state["quant_type"])

    def weight_shape(self, linear: StoredLinear) -> tuple[int, ...]:
        state = _state(linear)
        return linear.shape("weight") if state is None else tuple(state["shape"])

    def config(
        self,
        default: object,
        schemes: Mapping[str, object],
        skipped: Sequence[str],
        dtype: torch.dtype,
    ) -> dict[str, Any]:
        """Key for key what save_pretrained writes."""
        return {
            "quant_method": "bitsandbytes",
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_compute_dtype": dtype_name(dtype),
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": expect(default, Nf4Scheme).double_quant,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": list(skipped),
            "llm_int8_threshold": 6.0,
        }

    def dialect(self, quantization: Mapping[str, Any]) -> Dialect:
        kind = "int8"
        if quantization.get("load_in_4bit") or quantization.get("_load_in_4bit"):
            kind = str(quantization.get("bnb_4bit_quant_type") or "fp4")
        return Dialect("bitsandbytes", kind, dict(quantization), writer=None, method=kind)

    def loading(self, contents: Contents) -> tuple[Loading, ...]:
        transformers = Loading("transformers", "yes", "with bitsandbytes and accelerate")
        if any(map(_fails_on_cpu, contents.schemes, contents.shapes)):
            why = (
                "on CPU: rows must be divisible by 32, columns by the block size; on a GPU untried"
            )
            transformers = Loading("transformers", "no", why)
        return (
            transformers,
            Loading("vLLM", "no", "0.32 has no bitsandbytes method"),
        )


def _fails_on_cpu(scheme: object, shape: Sequence[int]) -> bool:
    """Whether the kernel for CPUs with bfloat16 can't lay out a linear's weight (out, in).

    That is ``_convert_weight_packed_for_cpu`` of bitsandbytes 0.50, which fails as the model runs.
    """
    if not isinstance(scheme, Nf4Scheme):
        return False
    return shape[0] % 32 != 0 or shape[1] % scheme.block_size != 0


def _unpack_int8(linear: StoredLinear) -> QuantizedTensor:
    if "weight_format" in linear.suffixes and int(linear.read("weight_format")) != 0:
        raise InputError(
            "its codes are stored in the order of a GPU's kernel (weight_format isn't 0)",
            where=linear.module,
            fix="Save it again with bitsandbytes 0.45 or later.",
        )
    codes = (linear.read("weight").to(torch.int16) + _INT8.middle).to(torch.uint8)
    scales = linear.read(_MAXIMA).float()[:, None] / 127
    return QuantizedTensor(_INT8, codes, scales, torch.full_like(scales, _INT8.middle).byte())


def _state(linear: StoredLinear) -> dict[str, Any] | None:
    """The description of a 4-bit linear; None for an 8-bit one."""
    for suffix in _STATES:
        if suffix in linear.suffixes:
            state: dict[str, Any] = json.loads(bytes(linear.read(suffix).tolist()))
            return state
    return None
