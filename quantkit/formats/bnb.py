"""bitsandbytes' 4-bit checkpoints, as transformers' save_pretrained writes and loads them.

Per linear: ``weight`` uint8 (out·in/2, 1), the even element in the high nibble;
``weight.absmax``, ``weight.quant_map``, with double quantization ``weight.nested_absmax`` and
``weight.nested_quant_map``; and ``weight.quant_state.bitsandbytes__nf4``, JSON as bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import not_installed
from quantkit.quantizers.nf4 import Nf4Scheme, Nf4Tensor

SUFFIXES = (
    "weight",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    "weight.quant_state.bitsandbytes__nf4",
)
MARKER = SUFFIXES[-1]


def nbytes(shape: tuple[int, int], scheme: Nf4Scheme) -> int:
    """Bytes of one packed linear (the JSON is counted as 200)."""
    count = shape[0] * shape[1]
    blocks = -(-count // scheme.block_size)
    maxima = blocks + -(-blocks // 256) * 4 + 256 * 4 if scheme.double_quant else blocks * 4
    return -(-count // 2) + maxima + 16 * 4 + 200


def pack(tensor: Nf4Tensor) -> dict[str, Tensor]:
    """Codes and quantization state → the format's tensors."""
    state = tensor.state.as_dict(packed=True)
    return {"weight": tensor.packed, **{f"weight.{key}": value for key, value in state.items()}}


def unpack(tensors: dict[str, Tensor], config: dict[str, Any], module: str) -> Nf4Tensor:
    """The format's tensors → codes and quantization state."""
    try:
        from bitsandbytes.functional import QuantState
    except ImportError as error:
        raise not_installed("bitsandbytes", "nf4") from error
    parts = {
        name.removeprefix("weight."): value for name, value in tensors.items() if name != "weight"
    }
    state = QuantState.from_dict(parts, device=torch.device("cpu"))
    return Nf4Tensor(tensors["weight"], state, tuple(state.shape))


def weight_shape(
    shape: Callable[[str], tuple[int, ...]], read: Callable[[str], Tensor]
) -> tuple[int, ...]:
    """(out, in) of a packed linear, from the shape and value of its tensors by suffix."""
    state = json.loads(bytes(read(MARKER).tolist()))
    return tuple(state["shape"])


def config(scheme: Nf4Scheme, compute_dtype: str, skipped: list[str]) -> dict[str, Any]:
    """``quantization_config`` of config.json, key for key what save_pretrained writes."""
    return {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": scheme.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skipped,
        "llm_int8_threshold": 6.0,
    }
