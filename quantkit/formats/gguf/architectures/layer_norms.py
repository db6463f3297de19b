"""Models whose norms subtract the mean."""

from __future__ import annotations

from collections.abc import Sequence

from quantkit.formats.gguf.architectures.architecture import Architecture, Metadata
from quantkit.formats.gguf.architectures.modules import (
    SILU,
    TANH_GELU,
    add_one,
    attention,
    gated,
    interleave,
    linear,
    norm,
    three_parts,
)
from quantkit.formats.gguf.architectures.parts import Config, Dimensions, Module, of_kind
from quantkit.formats.gguf.rope import Rope

_EPSILON = "attention.layer_norm_epsilon"
_BY_HEAD = "normed by head"


def bloom_settings(config: Config) -> Config:
    """Sizes that Bloom derives from others."""
    hidden = config["hidden_size"]
    return {
        "intermediate_size": 4 * hidden,
        "num_key_value_heads": None,
        "max_position_embeddings": config.get("seq_length") or hidden,
    }


def cohere_settings(config: Config) -> Config:
    """The number of positions: Cohere's configs have another one for transformers' cache."""
    given = config.get("model_max_length")
    return {"max_position_embeddings": given} if given else {}


def cohere_layers(config: Config, layers: int) -> Sequence[str]:
    """Whether q and k are normalized, in all layers or in none."""
    return [_BY_HEAD if config.get("use_qk_norm") else ""] * layers


def cohere_differs(config: Config, dimensions: Dimensions) -> str | None:
    """How a model differs from the graph, which normalizes q and k from 64 layers on."""
    if bool(config.get("use_qk_norm")) != (dimensions.layers >= 64):
        return f"use_qk_norm {config.get('use_qk_norm')} in {dimensions.layers} layers"
    return None


def cohere2_differs(config: Config, dimensions: Dimensions) -> str | None:
    """How a model differs from the graph, in which every fourth layer attends fully."""
    kinds = [
        "sliding_attention" if (layer + 1) % 4 else "full_attention"
        for layer in range(dimensions.layers)
    ]
    return (
        None if config.get("layer_types") == kinds else "layer_types other than full at every 4th"
    )


def unscaled(config: Config, dimensions: Dimensions, rope: Rope) -> Metadata:
    """That rotary embeddings have no scaling, which these graphs' files say."""
    return {"rope.scaling.type": "none"} if rope.kind == "default" else {}


def stablelm_layers(config: Config, layers: int) -> Sequence[str]:
    """Whether the MLP has a norm of its own, or reads what attention does."""
    return ["" if config.get("use_parallel_residual") else "serial"] * layers


def fixed_epsilon(config: Config) -> Config:
    """The epsilon that OLMo's norms, which have no weights, have built in."""
    return {"layer_norm_eps": 1e-5}


LAYER_NORMS = (
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
    Architecture(
        name="stablelm",
        model_types=("stablelm",),
        modules=(
            norm("input_layernorm", bias=True),
            *attention(qkv="use_qkv_bias"),
            *of_kind("serial", [norm("post_attention_layernorm", bias=True)]),
            *gated(),
        ),
        layer_kinds=stablelm_layers,
        norm=norm("model.norm", bias=True),
        epsilon=(_EPSILON, "layer_norm_eps"),
        copied={"use_parallel_residual": "use_parallel_residual"},
        fixed={**SILU, "qk_layernorm": (False,)},
        partial_rope=True,
        square=True,
        output="needed",
    ),
    Architecture(
        name="bloom",
        model_types=("bloom",),
        modules=(
            norm("input_layernorm", bias=True),
            linear("self_attention.query_key_value", "qkv", "hidden", True, three_parts),
            linear("self_attention.dense", "hidden", "hidden", bias=True),
            norm("post_attention_layernorm", bias=True),
            linear("mlp.dense_h_to_4h", "inner", "hidden", bias=True),
            linear("mlp.dense_4h_to_h", "hidden", "inner", bias=True),
        ),
        outside=(norm("transformer.word_embeddings_layernorm", bias=True),),
        blocks="transformer.h",
        embedding="transformer.word_embeddings",
        norm=norm("transformer.ln_f", bias=True),
        derived=bloom_settings,
        epsilon=(_EPSILON, "layer_norm_epsilon"),
        fixed={"apply_residual_connection_post_layernorm": (False,)},
        ropes=(),
        square=True,
    ),
    Architecture(
        name="nemotron",
        model_types=("nemotron",),
        modules=(
            norm("input_layernorm", bias=True, change=add_one),
            *attention("attention_bias", "attention_bias"),
            norm("post_attention_layernorm", bias=True, change=add_one),
            linear("mlp.up_proj", "inner", "hidden", "mlp_bias"),
            linear("mlp.down_proj", "hidden", "inner", "mlp_bias"),
        ),
        norm=norm("model.norm", bias=True, change=add_one),
        epsilon=(_EPSILON, "norm_eps"),
        fixed={"hidden_act": ("relu2",)},
        ropes=("default", "linear"),
        partial_rope=True,
        square=True,
        output="needed",
        more=unscaled,
    ),
    Architecture(
        name="command-r",
        model_types=("cohere",),
        modules=(
            norm("input_layernorm"),
            *attention(),
            *of_kind(
                _BY_HEAD,
                [
                    Module("self_attn.q_norm", ("heads", "head")),
                    Module("self_attn.k_norm", ("kv heads", "head")),
                ],
            ),
            *gated(),
        ),
        layer_kinds=cohere_layers,
        derived=cohere_settings,
        epsilon=(_EPSILON, "layer_norm_eps"),
        copied={"logit_scale": "logit_scale"},
        fixed={**SILU, "attention_bias": (False,)},
        ropes=("default",),
        square=True,
        output="never",
        more=unscaled,
        unsupported=cohere_differs,
    ),
    Architecture(
        name="cohere2",
        model_types=("cohere2",),
        modules=(norm("input_layernorm"), *attention(), *gated()),
        epsilon=(_EPSILON, "layer_norm_eps"),
        copied={"logit_scale": "logit_scale"},
        fixed={**SILU, "attention_bias": (False,)},
        ropes=("default",),
        square=True,
        window="computed",
        output="never",
        more=unscaled,
        unsupported=cohere2_differs,
    ),
    Architecture(
        name="olmo",
        model_types=("olmo",),
        modules=(*attention(change=interleave), *gated()),
        norm=None,
        derived=fixed_epsilon,
        epsilon=(_EPSILON, "layer_norm_eps"),
        copied={"attention.clamp_kqv": "clip_qkv"},
        optional=("clip_qkv",),
        fixed={**SILU, "attention_bias": (False,)},
        square=True,
    ),
    Architecture(
        name="phi2",
        model_types=("phi",),
        modules=(
            norm("input_layernorm", bias=True),
            *attention(qkv=True)[:3],
            linear("self_attn.dense", "hidden", "hidden", bias=True),
            linear("mlp.fc1", "inner", "hidden", bias=True),
            linear("mlp.fc2", "hidden", "inner", bias=True),
        ),
        outside=(Module("lm_head.bias", ("vocabulary",), stored="output.bias", bare=True),),
        norm=norm("model.final_layernorm", bias=True),
        epsilon=(_EPSILON, "layer_norm_eps"),
        fixed={"hidden_act": TANH_GELU, "qk_layernorm": (False,)},
        partial_rope=True,
        square=True,
        output="needed",
    ),
)
