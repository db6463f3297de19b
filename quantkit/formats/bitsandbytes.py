"""bitsandbytes' checkpoints, as transformers' save_pretrained writes and loads them.

4 bits, per linear: ``weight`` uint8 (out·in/2, 1), the even element in the high nibble;
``weight.absmax``, ``weight.quant_map``, with double quantization ``weight.nested_absmax`` and
``weight.nested_quant_map``; and ``weight.quant_state.bitsandbytes__nf4`` (or ``fp4``), JSON as
bytes. Others may have stored the codes as another dtype of the same bytes.

8 bits (LLM.int8, read only): ``weight`` int8 (out, in), ``SCB`` fp32 (out), the rows' absolute
maxima, so that w = q · SCB / 127; ``weight_format`` uint8, 0 for rows as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from quantkit.base.errors import InputError, not_installed
from quantkit.methods.grids import Grid, Quantized, QuantizedTensor
from quantkit.methods.nf4 import Nf4Scheme, Nf4Tensor

SUFFIXES = (
    "weight",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    "weight.quant_state.bitsandbytes__nf4",
)
_STATES = (SUFFIXES[-1], "weight.quant_state.bitsandbytes__fp4")
_MAXIMA = "SCB"
MARKERS = (*_STATES, _MAXIMA)  # the suffixes that only a quantized linear has
READ = (*SUFFIXES, *MARKERS[1:], "weight_format")  # every suffix that others' linears may have


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


def unpack(tensors: dict[str, Tensor], config: dict[str, Any], module: str) -> Quantized:
    """The format's tensors → codes and quantization state, or codes on an 8-bit grid."""
    if _MAXIMA in tensors:
        return _unpack_int8(tensors, module)
    try:
        from bitsandbytes.functional import QuantState
    except ImportError as error:
        raise not_installed("bitsandbytes", "nf4") from error
    parts = {
        name.removeprefix("weight."): value for name, value in tensors.items() if name != "weight"
    }
    state = QuantState.from_dict(parts, device=torch.device("cpu"))
    codes = tensors["weight"].view(torch.uint8).reshape(-1, 1)
    return Nf4Tensor(codes, state, tuple(state.shape))


def _unpack_int8(tensors: dict[str, Tensor], module: str) -> QuantizedTensor:
    if int(tensors.get("weight_format", torch.tensor(0))) != 0:
        raise InputError(
            "its rows are stored in a GPU's own order (weight_format isn't 0)",
            where=module,
            fix="Save it again with bitsandbytes 0.45 or later.",
        )
    grid = Grid(8, -1, True)
    codes = (tensors["weight"].to(torch.int16) + grid.middle).to(torch.uint8)
    scales = tensors[_MAXIMA].float()[:, None] / 127
    return QuantizedTensor(grid, codes, scales, torch.full_like(scales, grid.middle).byte())


def scheme(
    shape: Callable[[str], tuple[int, ...]],
    read: Callable[[str], Tensor],
    config: dict[str, Any],
    module: str,
) -> Grid | Nf4Scheme:
    """What a packed linear is rounded to."""
    state = _state(read)
    if state is None:
        return Grid(8, -1, True)
    return Nf4Scheme(state["blocksize"], "nested_blocksize" in state, state["quant_type"])


def weight_shape(
    shape: Callable[[str], tuple[int, ...]], read: Callable[[str], Tensor]
) -> tuple[int, ...]:
    """(out, in) of a packed linear, from the shape and value of its tensors by suffix."""
    state = _state(read)
    return shape("weight") if state is None else tuple(state["shape"])


def _state(read: Callable[[str], Tensor]) -> dict[str, Any] | None:
    """The description of a 4-bit linear; None for an 8-bit one."""
    for name in _STATES:
        with suppress(KeyError):
            state: dict[str, Any] = json.loads(bytes(read(name).tolist()))
            return state
    return None


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
