"""Families of one or two models."""

from __future__ import annotations

from quantkit.formats.gguf.architectures.architecture import Architecture
from quantkit.formats.gguf.architectures.modules import (
    SILU,
    TANH_GELU,
    attention,
    gated,
    linear,
    norm,
    three_parts,
)

OTHERS = (
    Architecture(
        name="phi3",
        model_types=("phi3",),
        modules=(
            norm("input_layernorm"),
            linear("self_attn.qkv_proj", "qkv", "hidden"),
            linear("self_attn.o_proj", "hidden", "q"),
            norm("post_attention_layernorm"),
            linear("mlp.gate_up_proj", "two inner", "hidden"),
            linear("mlp.down_proj", "hidden", "inner"),
        ),
        copied={"rope.scaling.original_context_length": "original_max_position_embeddings"},
        fixed=SILU,
        ropes=("default", "longrope"),
        partial_rope=True,
        square=True,
        window="written",
    ),
    Architecture(
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
    ),
    Architecture(
        name="starcoder2",
        model_types=("starcoder2",),
        modules=(
            norm("input_layernorm", bias=True),
            *attention(qkv=True, out=True),
            norm("post_attention_layernorm", bias=True),
            linear("mlp.c_fc", "inner", "hidden", bias=True),
            linear("mlp.c_proj", "hidden", "inner", bias=True),
        ),
        norm=norm("model.norm", bias=True),
        epsilon=("attention.layer_norm_epsilon", "norm_epsilon"),
        fixed={"hidden_act": TANH_GELU, "use_bias": (True,)},
        square=True,
    ),
    Architecture(
        name="gptneox",
        model_types=("gpt_neox",),
        modules=(
            norm("input_layernorm", bias=True),
            linear("attention.query_key_value", "qkv", "hidden", True, three_parts),
            linear("attention.dense", "hidden", "hidden", bias=True),
            norm("post_attention_layernorm", bias=True),
            linear("mlp.dense_h_to_4h", "inner", "hidden", bias=True),
            linear("mlp.dense_4h_to_h", "hidden", "inner", bias=True),
        ),
        blocks="gpt_neox.layers",
        embedding="gpt_neox.embed_in",
        norm=norm("gpt_neox.final_layer_norm", bias=True),
        head="embed_out",
        epsilon=("attention.layer_norm_epsilon", "layer_norm_eps"),
        copied={"use_parallel_residual": "use_parallel_residual"},
        # llama.cpp computes every GELU by the tanh formula; the exact one differs by 1e-3 at most.
        fixed={"hidden_act": ("gelu", *TANH_GELU), "attention_bias": (True,)},
        ropes=("default", "linear"),
        partial_rope=True,
        square=True,
        output="needed",
    ),
)
