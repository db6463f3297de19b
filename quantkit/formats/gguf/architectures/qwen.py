"""The Qwen models."""

from __future__ import annotations

from dataclasses import replace

from quantkit.base.errors import InputError
from quantkit.formats.gguf.architectures.architecture import Architecture, Metadata
from quantkit.formats.gguf.architectures.modules import (
    SILU,
    attention,
    gated,
    norm,
    pre_norms,
)
from quantkit.formats.gguf.architectures.parts import Config, Dimensions
from quantkit.formats.gguf.rope import Rope


def sections(config: Config, dimensions: Dimensions, rope: Rope) -> Metadata:
    """How many frequencies are for time, height and width, and images' features by layer."""
    given = rope.settings.get("mrope_section")
    if not isinstance(given, list) or len(given) not in (3, 4):
        raise InputError("rope_parameters have no three numbers mrope_section", where="config.json")
    return {"rope.dimension_sections": [*given, 0][:4]}


def qwen3vl_keys(config: Config, dimensions: Dimensions, rope: Rope) -> Metadata:
    """Beside the sections, how many layers images' features are added to."""
    images = config.get("vision_config") or {}
    layers = len(images.get("deepstack_visual_indexes") or ())
    return {**sections(config, dimensions, rope), "n_deepstack_layers": layers}


_QWEN2 = Architecture(
    name="qwen2",
    model_types=("qwen2",),
    modules=pre_norms(attention(qkv=True), gated()),
    fixed=SILU,
    square=True,
)
_QWEN3 = Architecture(
    name="qwen3",
    model_types=("qwen3",),
    modules=(
        norm("input_layernorm"),
        *attention(),
        norm("self_attn.q_norm", "head"),
        norm("self_attn.k_norm", "head"),
        norm("post_attention_layernorm"),
        *gated(),
    ),
    fixed={**SILU, "attention_bias": (False,)},
)

QWEN = (
    _QWEN2,
    _QWEN3,
    replace(
        _QWEN2,
        name="qwen2vl",
        model_types=("qwen2_vl_text", "qwen2_5_vl_text"),
        ropes=("default", "mrope"),
        more=sections,
    ),
    replace(
        _QWEN3,
        name="qwen3vl",
        model_types=("qwen3_vl_text",),
        ropes=("default", "mrope"),
        more=qwen3vl_keys,
    ),
)
