"""The llama architecture in GGUF: names, the permutation of q and k, and the metadata.

References: ``conversion/llama.py`` (names, permutation, rope factors) and
``src/models/llama.cpp`` (what the architecture can hold) of llama.cpp.

llama.cpp rotates neighbouring pairs (2j, 2j+1) where Hugging Face rotates (j, j + half), so the
rows of q and k, weights and biases, are stored interleaved.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import InputError
from quantkit.formats.gguf_mixes import Layout

ARCHITECTURE = "llama"
MODEL_TYPES = ("llama", "mistral")
ROPE_FREQS = "rope_freqs.weight"

_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTSIDE_BACK = {gguf: hf for hf, gguf in _OUTSIDE.items()}
_INSIDE_BACK = {gguf: hf for hf, gguf in _INSIDE.items()}
_REQUIRED = (
    *("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size"),
    *("vocab_size", "max_position_embeddings", "rms_norm_eps"),
)
_LINEARS = [name for name in _INSIDE if "norm" not in name]
_HF_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_GGUF_BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")

Metadata = dict[str, Any]  # str, bool, int (u32), float (f32) or a list of one of these


def gguf_name(key: str) -> str | None:
    """Return the GGUF name of a checkpoint key, or None when there is none."""
    if key in _OUTSIDE:
        return _OUTSIDE[key]
    match = _HF_BLOCK.fullmatch(key)
    if match and match[2] in _INSIDE:
        return f"blk.{match[1]}.{_INSIDE[match[2]]}.{match[3]}"
    return None


def hf_key(name: str) -> str | None:
    """Return the checkpoint key of a GGUF name, or None when there is none."""
    if name in _OUTSIDE_BACK:
        return _OUTSIDE_BACK[name]
    match = _GGUF_BLOCK.fullmatch(name)
    if match and match[2] in _INSIDE_BACK:
        return f"model.layers.{match[1]}.{_INSIDE_BACK[match[2]]}.{match[3]}"
    return None


def permuted_heads(name: str, heads: int, kv_heads: int) -> int:
    """Return the number of heads that the tensor's rows are permuted in; 0: not at all."""
    if ".attn_q." in name:
        return heads
    return kv_heads if ".attn_k." in name else 0


def permute(tensor: Tensor, heads: int) -> Tensor:
    """Interleave the rows (heads * head_dim, …) within each head; 0 heads: nothing to do."""
    if heads == 0:
        return tensor
    half = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(tensor.shape)


def unpermute(tensor: Tensor, heads: int) -> Tensor:
    """The inverse of ``permute``."""
    if heads == 0:
        return tensor
    half = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(tensor.shape)


def check(config: Mapping[str, Any]) -> None:
    """Raise InputError, naming the reason, for a model that the architecture can't hold."""
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise InputError(
            f"model_type {model_type!r} can't be written as GGUF",
            where="config.json",
            mend=f"Supported: {', '.join(MODEL_TYPES)}.",
        )
    for key in _REQUIRED:
        if not isinstance(config.get(key), int | float):
            raise InputError(f"has no number {key}", where="config.json")
    plain = {
        "quantization_config": None,
        "hidden_act": "silu",
        "partial_rotary_factor": 1.0,
        "num_local_experts": None,
    }
    found = {**config, **_rope(config)}
    for key, value in plain.items():
        if found.get(key) not in (None, value):
            raise InputError(
                f"{key} {found[key]!r}: GGUF's llama architecture can't hold such a model",
                where="config.json",
            )


def layout(config: Mapping[str, Any], *, tied: bool) -> Layout:
    """Return what the mixes look at. ``tied``: no output matrix of its own is written."""
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    return Layout(int(config["num_hidden_layers"]), heads, kv_heads, tied)


def head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def shapes(config: Mapping[str, Any], keys: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return every checkpoint key that the config asks for, in GGUF's order, with its shape.

    Biases and the output matrix are optional in the architecture: they are among the result
    when ``keys``, the checkpoint's own, has them.
    """
    present = set(keys)
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    vocabulary, width = int(config["vocab_size"]), head_dim(config)
    count = layout(config, tied=True)
    rows = dict.fromkeys(_LINEARS, hidden) | {
        "self_attn.q_proj": count.heads * width,
        "self_attn.k_proj": count.kv_heads * width,
        "self_attn.v_proj": count.kv_heads * width,
        "mlp.gate_proj": inner,
        "mlp.up_proj": inner,
    }
    columns = dict.fromkeys(_LINEARS, hidden) | {
        "self_attn.o_proj": count.heads * width,
        "mlp.down_proj": inner,
    }
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(count.layers):
        for name in _INSIDE:
            key = f"model.layers.{layer}.{name}"
            if name in rows:
                result[f"{key}.weight"] = (rows[name], columns[name])
                if f"{key}.bias" in present:
                    result[f"{key}.bias"] = (rows[name],)
            else:
                result[f"{key}.weight"] = (hidden,)
    result["model.norm.weight"] = (hidden,)
    if "lm_head.weight" in present:
        result["lm_head.weight"] = (vocabulary, hidden)
    return result


def metadata(config: Mapping[str, Any]) -> Metadata:
    """Return the ``llama.*`` keys. Raises InputError for a rope scaling that can't be written."""
    check(config)
    count = layout(config, tied=True)
    rope = _rope(config)
    context = int(config["max_position_embeddings"])
    # Mistral's sliding window (4096 unless it says otherwise): llama.cpp gives this architecture
    # full attention, which is the same up to the window, so the context ends there.
    window = config.get("sliding_window", 4096) if config["model_type"] == "mistral" else None
    values: Metadata = {
        "block_count": count.layers,
        "context_length": min(context, int(window)) if window else context,
        "embedding_length": int(config["hidden_size"]),
        "feed_forward_length": int(config["intermediate_size"]),
        "attention.head_count": count.heads,
        "attention.head_count_kv": count.kv_heads,
        "attention.key_length": head_dim(config),
        "attention.value_length": head_dim(config),
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "vocab_size": int(config["vocab_size"]),
        "rope.dimension_count": head_dim(config),
        "rope.freq_base": float(rope["rope_theta"]),
        **_rope_scaling(rope),
    }
    return {f"{ARCHITECTURE}.{key}": value for key, value in values.items()}


def rope_freqs(config: Mapping[str, Any]) -> Tensor | None:
    """Return Llama 3's divisors of the rotary frequencies, float32 (head_dim / 2,), or None.

    Formula: ``_compute_llama3_parameters`` of transformers, divided out.
    """
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    factor, low, high, old_context = (_rope_number(rope, name) for name in names)
    width = head_dim(config)
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    wavelengths = 2 * math.pi * rope["rope_theta"] ** exponents
    smooth = (old_context / wavelengths - low) / (high - low)
    divisors = 1 / ((1 - smooth) / factor + smooth)
    divisors = torch.where(wavelengths > old_context / low, factor, divisors)
    return torch.where(wavelengths < old_context / high, 1.0, divisors)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings, wherever they are: transformers 5 writes ``rope_parameters``, before
    that it was ``rope_theta`` at top level and ``rope_scaling`` (with ``type`` before 4.43)."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    rope.setdefault("rope_type", rope.get("type", "default"))
    for key in ("partial_rotary_factor", "original_max_position_embeddings"):
        if config.get(key) is not None:
            rope.setdefault(key, config[key])
    return rope


def _rope_number(rope: Mapping[str, Any], name: str) -> float:
    value = rope.get(name)
    if not isinstance(value, int | float):
        raise InputError(
            f"rope type {rope['rope_type']} without a number {name}", where="config.json"
        )
    return float(value)


def _rope_scaling(rope: Mapping[str, Any]) -> Metadata:
    kind = rope["rope_type"]
    if kind in ("default", "llama3"):  # llama3: in the tensor rope_freqs.weight
        return {}
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": _rope_number(rope, "factor")}
    if kind == "yarn":
        special = ("attention_factor", "mscale", "mscale_all_dim")
        changed = [key for key in special if rope.get(key) is not None]
        if changed or rope.get("truncate") is False:
            raise InputError(
                f"yarn rope with {', '.join(changed) or 'truncate: false'} can't be written as "
                "GGUF: llama.cpp would compute other angles or another attention scale",
                where="config.json",
            )
        betas = {
            f"rope.scaling.yarn_{key}": float(rope[key])
            for key in ("beta_fast", "beta_slow")
            if rope.get(key) is not None
        }
        original = int(_rope_number(rope, "original_max_position_embeddings"))
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": _rope_number(rope, "factor"),
            "rope.scaling.original_context_length": original,
            **betas,
        }
    raise InputError(
        f"rope type {kind!r} can't be written as GGUF",
        where="config.json",
        mend="Supported: default, linear, llama3, yarn.",
    )
