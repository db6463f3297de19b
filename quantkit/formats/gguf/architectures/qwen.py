"""The Qwen models."""

from __future__ import annotations

from quantkit.formats.gguf.architectures.architecture import Architecture
from quantkit.formats.gguf.architectures.modules import (
    SILU,
    attention,
    gated,
    norm,
    pre_norms,
)

QWEN = (
    Architecture(
        name="qwen2",
        model_types=("qwen2",),
        modules=pre_norms(attention(qkv=True), gated()),
        fixed=SILU,
        square=True,
    ),
    Architecture(
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
    ),
)
