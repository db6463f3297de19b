"""Models with norms after attention and MLP."""

from __future__ import annotations

from dataclasses import replace

from quantkit.formats.gguf.architectures.architecture import Architecture
from quantkit.formats.gguf.architectures.modules import (
    LLAMA3_ROPES,
    SILU,
    attention,
    gated,
    linear,
    norm,
)
from quantkit.formats.gguf.architectures.parts import Config, Dimensions
from quantkit.formats.gguf.rope import read_rope


def olmo3_differs(config: Config, dimensions: Dimensions) -> str | None:
    """How a model differs from the graph, which has one base of the frequencies for all layers."""
    rope = read_rope(config)
    if rope.local_theta not in (None, rope.theta):
        return f"rope_theta {rope.local_theta} in sliding layers, and {rope.theta} in the others"
    return None


def exaone4_differs(config: Config, dimensions: Dimensions) -> str | None:
    """How a model differs from the graph, which has windows only in one of 64 layers."""
    if config.get("sliding_window") and dimensions.layers != 64:
        return f"sliding_window {config['sliding_window']} in {dimensions.layers} layers, not 64,"
    return None


_OLMO2 = Architecture(
    name="olmo2",
    model_types=("olmo2",),
    modules=(
        *attention(),
        norm("self_attn.q_norm", "q"),
        norm("self_attn.k_norm", "kv"),
        norm("post_attention_layernorm"),
        *gated(),
        norm("post_feedforward_layernorm"),
    ),
    fixed={**SILU, "attention_bias": (False,)},
    square=True,
    output="needed",
)

POST_NORMS = (
    _OLMO2,
    replace(_OLMO2, model_types=("olmo3",), window="listed", unsupported=olmo3_differs),
    Architecture(
        name="exaone4",
        model_types=("exaone4",),
        modules=(
            *attention(),
            norm("self_attn.q_norm", "head"),
            norm("self_attn.k_norm", "head"),
            norm("post_attention_layernorm"),
            *gated(),
            norm("post_feedforward_layernorm"),
        ),
        fixed=SILU,
        ropes=LLAMA3_ROPES,
        square=True,
        window="listed",
        unsupported=exaone4_differs,
    ),
    Architecture(
        name="glm4",
        model_types=("glm4",),
        modules=(
            norm("input_layernorm"),
            *attention(qkv="attention_bias"),
            norm("post_self_attn_layernorm"),
            norm("post_attention_layernorm"),
            linear("mlp.gate_up_proj", "two inner", "hidden"),
            linear("mlp.down_proj", "hidden", "inner"),
            norm("post_mlp_layernorm"),
        ),
        fixed=SILU,
        partial_rope=True,
    ),
)
