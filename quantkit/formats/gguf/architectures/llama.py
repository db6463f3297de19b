"""Llama and the models that add little to it."""

from __future__ import annotations

from quantkit.formats.gguf.architectures.architecture import Architecture, Config, Dimensions
from quantkit.formats.gguf.architectures.modules import (
    LLAMA3_ROPES,
    SILU,
    attention,
    gated,
    interleave,
    pre_norms,
)


def smollm3_differs(config: Config, dimensions: Dimensions) -> str | None:
    """How a model differs from the graph, which rotates nothing in every fourth layer."""
    without = [int((layer + 1) % 4 != 0) for layer in range(dimensions.layers)]
    given, interval = config.get("no_rope_layers"), config.get("no_rope_layer_interval", 4)
    if given not in (None, without) or (given is None and interval != 4):
        return "no_rope_layers other than every fourth"
    return None


LLAMA = (
    Architecture(
        name="llama",
        model_types=("llama", "mistral"),
        modules=pre_norms(
            attention("attention_bias", "attention_bias", interleave), gated("mlp_bias")
        ),
        fixed={**SILU, "num_local_experts": ()},
        ropes=LLAMA3_ROPES,
    ),
    Architecture(
        name="smollm3",
        model_types=("smollm3",),
        modules=pre_norms(attention(change=interleave), gated()),
        fixed={**SILU, "attention_bias": (False,), "mlp_bias": (False,)},
        unsupported=smollm3_differs,
    ),
    Architecture(
        name="granite",
        model_types=("granite",),
        modules=pre_norms(
            attention("attention_bias", "attention_bias", interleave), gated("mlp_bias")
        ),
        copied={
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        fixed=SILU,
        ropes=LLAMA3_ROPES,
    ),
)
