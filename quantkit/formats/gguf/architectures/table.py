"""The architectures that can be written as GGUF: one description each, in one table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from quantkit.base.errors import InputError
from quantkit.formats.gguf.architectures.architecture import Architecture, Config, Dimensions
from quantkit.formats.gguf.architectures.modules import (
    add_one,
    attention,
    gated,
    gemma_blocks,
    interleave,
    linear,
    norm,
    pre_norms,
    three_parts,
)


def smollm3_differs(config: Config, dimensions: Dimensions) -> str | None:
    """How a model differs from the graph, which rotates nothing in every fourth layer."""
    without = [int((layer + 1) % 4 != 0) for layer in range(dimensions.layers)]
    given, interval = config.get("no_rope_layers"), config.get("no_rope_layer_interval", 4)
    if given not in (None, without) or (given is None and interval != 4):
        return "no_rope_layers other than every fourth"
    return None


def gemma_differs(period: int, largest: int) -> Callable[[Config, Dimensions], str | None]:
    """How a model differs from the graph of Gemma 2 or 3.

    ``period``: every such layer attends fully; ``largest``: the number of layers of the one model
    whose queries are scaled by hidden / heads, where the others' are by head_dim.
    """

    def differs(config: Config, dimensions: Dimensions) -> str | None:
        kinds = [
            "full_attention" if (layer + 1) % period == 0 else "sliding_attention"
            for layer in range(dimensions.layers)
        ]
        if config.get("layer_types") not in (None, kinds):
            return f"layer_types other than full at every {period}th"
        if config.get("sliding_window_pattern", period) != period:
            return f"sliding_window_pattern other than {period}"
        scale = dimensions.head_dim
        if dimensions.layers == largest:
            scale = dimensions.hidden // dimensions.heads
        if config.get("query_pre_attn_scalar", scale) != scale:
            return f"query_pre_attn_scalar {config['query_pre_attn_scalar']} other than {scale}"
        return None

    return differs


_TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
_GEMMA_NORM = norm("model.norm", change=add_one)
_GEMMA_FIXED = {
    "hidden_activation": _TANH_GELU,
    "use_bidirectional_attention": (False,),
    "attention_bias": (False,),
}
_SILU = {"hidden_act": ("silu",)}
_NO_WINDOW = {"use_sliding_window": False}
_LLAMA3_ROPES = ("default", "linear", "llama3", "yarn")

ARCHITECTURES = (
    Architecture(
        name="llama",
        model_types=("llama", "mistral"),
        modules=pre_norms(
            attention("attention_bias", "attention_bias", interleave), gated("mlp_bias")
        ),
        fixed={**_SILU, "num_local_experts": ()},
        ropes=_LLAMA3_ROPES,
    ),
    Architecture(
        name="qwen2",
        model_types=("qwen2",),
        modules=pre_norms(attention(qkv=True), gated()),
        defaults=_NO_WINDOW,
        fixed=_SILU,
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
        defaults={**_NO_WINDOW, "head_dim": 128},
        fixed={**_SILU, "attention_bias": (False,)},
    ),
    Architecture(
        name="gemma",
        model_types=("gemma",),
        modules=gemma_blocks(heads=False, after=False),
        norm=_GEMMA_NORM,
        defaults={"tie_word_embeddings": True, "head_dim": 256},
        # Gemma 1 had "gelu" in its config where the tanh formula was meant.
        fixed={**_GEMMA_FIXED, "hidden_act": ("gelu", *_TANH_GELU)},
        ropes=("default", "linear"),
        output="never",
    ),
    Architecture(
        name="gemma2",
        model_types=("gemma2",),
        modules=gemma_blocks(heads=False, after=True),
        norm=_GEMMA_NORM,
        copied={
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        defaults={
            "tie_word_embeddings": True,
            "head_dim": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "query_pre_attn_scalar": 256,
        },
        fixed=_GEMMA_FIXED,
        ropes=("default", "linear"),
        window="computed",
        output="never",
        unsupported=gemma_differs(period=2, largest=46),
    ),
    Architecture(
        name="gemma3",
        model_types=("gemma3_text",),
        modules=gemma_blocks(heads=True, after=True),
        norm=_GEMMA_NORM,
        copied={"final_logit_softcapping": "final_logit_softcapping"},
        defaults={
            "tie_word_embeddings": True,
            "head_dim": 256,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
        fixed={**_GEMMA_FIXED, "attn_logit_softcapping": ()},
        ropes=("default", "linear"),
        window="computed",
        unsupported=gemma_differs(period=6, largest=62),
    ),
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
        defaults={"original_max_position_embeddings": 4096},
        copied={"rope.scaling.original_context_length": "original_max_position_embeddings"},
        fixed=_SILU,
        ropes=("default", "longrope"),
        partial_rope=True,
        square=True,
        window="written",
    ),
    Architecture(
        name="smollm3",
        model_types=("smollm3",),
        modules=pre_norms(attention(change=interleave), gated()),
        defaults={**_NO_WINDOW, "tie_word_embeddings": True, "rope_theta": 2e6},
        fixed={**_SILU, "attention_bias": (False,), "mlp_bias": (False,)},
        unsupported=smollm3_differs,
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
        fixed={**_SILU, "attention_bias": (False,)},
        square=True,
        output="needed",
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
        defaults=dict.fromkeys(
            (
                *("attention_multiplier", "embedding_multiplier"),
                *("residual_multiplier", "logits_scaling"),
            ),
            1.0,
        ),
        fixed=_SILU,
        ropes=_LLAMA3_ROPES,
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
        defaults={"tie_word_embeddings": True},
        fixed={"hidden_act": _TANH_GELU, "use_bias": (True,)},
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
        defaults={"use_parallel_residual": True, "rotary_pct": 0.25},
        # llama.cpp computes every GELU by the tanh formula; the exact one differs by 1e-3 at most.
        fixed={"hidden_act": ("gelu", *_TANH_GELU), "attention_bias": (True,)},
        ropes=("default", "linear"),
        partial_rope=True,
        square=True,
        output="needed",
    ),
)


def find_architecture(name: str) -> Architecture:
    """An architecture by llama.cpp's name. Raises InputError for an unknown one."""
    for architecture in ARCHITECTURES:
        if architecture.name == name:
            return architecture
    known = ", ".join(architecture.name for architecture in ARCHITECTURES)
    raise InputError(
        f"the architecture {name!r} can't be read", fix=f"Those that can be read: {known}."
    )


def architecture_of(config: Config) -> Architecture:
    """The architecture that a config's model is written as.

    Raises InputError, with the list of those that work, for another model_type.
    """
    model_type = config.get("model_type")
    for architecture in ARCHITECTURES:
        if model_type in architecture.model_types:
            return architecture
    known = ", ".join(name for a in ARCHITECTURES for name in a.model_types)
    raise InputError(
        f"model_type {model_type!r} can't be written as GGUF",
        where="config.json",
        fix=f"Those that can: {known}.",
    )


def with_defaults(architecture: Architecture, config: Config) -> dict[str, Any]:
    """The config, with transformers' defaults for settings that it lacks."""
    mistral = {"sliding_window": 4096} if config.get("model_type") == "mistral" else {}
    return {**architecture.defaults, **mistral, **config}
