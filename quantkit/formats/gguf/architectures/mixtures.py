"""Mixtures of experts.

Mixtral is written as llama, and so is among the Llama models; DeepSeek's and GLM's have a file of
their own.
"""

from __future__ import annotations

from dataclasses import replace

from quantkit.formats.gguf.architectures.architecture import Architecture, Metadata
from quantkit.formats.gguf.architectures.hybrids import (
    DELTA_SIZES,
    delta_differs,
    delta_keys,
    delta_net,
    gated_attention,
    listed_layers,
)
from quantkit.formats.gguf.architectures.modules import (
    LLAMA3_ROPES,
    SIGMOID,
    SILU,
    add_one,
    attention,
    correction,
    experts,
    gated,
    interleave,
    leading_dense,
    mixtral_experts,
    norm,
    pre_norms,
    router,
)
from quantkit.formats.gguf.architectures.parts import Config, Dimensions, Module, of_kind
from quantkit.formats.gguf.architectures.qwen import qwen3vl_keys
from quantkit.formats.gguf.rope import Rope

_SHARED_INNER = "expert_shared_feed_forward_length"
_USED = {"expert_used_count": "num_experts_per_tok"}
_ALL_LAYERS = {"mlp_only_layers": ([],), "decoder_sparse_step": (1,)}
_BY_HEAD = (norm("self_attn.q_norm", "head"), norm("self_attn.k_norm", "head"))


def _one(dimensions: Dimensions) -> int:
    return 1


def _gpt_oss_differs(config: Config, dimensions: Dimensions) -> str | None:
    """How a model differs from the graph, where every second layer attends to all."""
    kinds = ["sliding_attention", "full_attention"] * dimensions.layers
    if config.get("layer_types") not in (None, kinds[: dimensions.layers]):
        return "layer_types other than sliding and full in turn"
    return None


def _ernie_differs(config: Config, dimensions: Dimensions) -> str | None:
    last = config.get("moe_layer_end_index", -1)
    if last not in (-1, None) and last < dimensions.layers - 1:
        return f"moe_layer_end_index {last}"
    return None


def _ernie(config: Config, dimensions: Dimensions, rope: Rope) -> Metadata:
    values: Metadata = {
        "interleave_moe_layer_step": int(config["moe_layer_interval"]),
        "leading_dense_block_count": int(config["moe_layer_start_index"]),
        "expert_shared_count": int(config["moe_num_shared_experts"]),
    }
    return values


def _hunyuan_differs(config: Config, dimensions: Dimensions) -> str | None:
    if not _one_of(config["moe_topk"]) or not _one_of(config["num_experts"]):
        return "num_experts or moe_topk that differs between layers"
    return None


def _hunyuan_used(config: Config, dimensions: Dimensions, rope: Rope) -> Metadata:
    return {"expert_used_count": _one_of(config["moe_topk"]), "expert_shared_count": 1}


def _one_of(value: int | list[int]) -> int:
    """A number that may be there for each layer; 0 where layers differ."""
    values = value if isinstance(value, list) else [value]
    return int(values[0]) if len(set(values)) == 1 else 0


# Beside the routed experts one for all tokens, whose output is scaled.
_SHARING = (
    router("mlp.gate"),
    *experts(),
    Module("mlp.shared_expert_gate", (_one, "hidden")),
    *gated(name="mlp.shared_expert", inner=_SHARED_INNER),
)
_SHARING_SIZES = {
    "expert_count": "num_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}

_QWEN3_MOE = Architecture(
    name="qwen3moe",
    model_types=("qwen3_moe",),
    modules=pre_norms(
        (*attention(), *_BY_HEAD),
        (router("mlp.gate"), *experts()),
    ),
    sizes={
        "expert_count": "num_experts",
        "expert_feed_forward_length": "moe_intermediate_size",
    },
    copied=_USED,
    fixed={
        **SILU,
        **_ALL_LAYERS,
        "attention_bias": (False,),
        "norm_topk_prob": (True,),
    },
)

MIXTURES = (
    _QWEN3_MOE,
    replace(
        _QWEN3_MOE,
        name="qwen3vlmoe",
        model_types=("qwen3_vl_moe_text",),
        ropes=("default", "mrope"),
        more=qwen3vl_keys,
    ),
    Architecture(
        name="qwen2moe",
        model_types=("qwen2_moe",),
        modules=pre_norms(
            attention(qkv="qkv_bias"),
            _SHARING,
        ),
        sizes=_SHARING_SIZES,
        copied=_USED,
        fixed={**SILU, **_ALL_LAYERS, "norm_topk_prob": (False,)},
        square=True,
        output="needed",
    ),
    Architecture(
        name="qwen35moe",
        model_types=("qwen3_5_moe_text",),
        modules=(
            norm("input_layernorm", change=add_one),
            *of_kind("full_attention", gated_attention()),
            *of_kind("linear_attention", delta_net()),
            norm("post_attention_layernorm", change=add_one),
            *_SHARING,
        ),
        layer_kinds=listed_layers,
        norm=norm("model.norm", change=add_one),
        # No layer has an MLP beside the experts.
        derived=lambda config: {"intermediate_size": 0},
        sizes={**DELTA_SIZES, **_SHARING_SIZES},
        copied=_USED,
        more=lambda *model: {**delta_keys(*model), "feed_forward_length": None},
        fixed={**SILU, "attention_bias": (False,)},
        ropes=("default", "mrope"),
        partial_rope=True,
        unsupported=delta_differs,
    ),
    Architecture(
        name="olmoe",
        model_types=("olmoe",),
        modules=pre_norms(
            (*attention(), norm("self_attn.q_norm", "q"), norm("self_attn.k_norm", "kv")),
            (router("mlp.gate"), *experts(inner="inner")),
        ),
        sizes={"expert_count": "num_experts"},
        copied=_USED,
        fixed={
            **SILU,
            "attention_bias": (False,),
            "clip_qkv": (),
            "norm_topk_prob": (False,),
        },
        square=True,
        output="needed",
    ),
    Architecture(
        name="gpt-oss",
        model_types=("gpt_oss",),
        modules=pre_norms(
            (
                *attention("attention_bias", "attention_bias"),
                Module("self_attn.sinks", ("heads",), stored="attn_sinks.weight", bare=True),
            ),
            (router("mlp.router", bias=True), *experts(inner="inner", bias=True)),
        ),
        sizes={
            "expert_count": "num_local_experts",
            "expert_feed_forward_length": "intermediate_size",
        },
        copied=_USED,
        fixed={
            **SILU,
            "attention_bias": (True,),
            "swiglu_alpha": (1.702,),
            "swiglu_limit": (7.0, 7),
        },
        ropes=("default", "yarn"),
        rounds_yarn=True,
        window="computed",
        output="needed",
        unsupported=_gpt_oss_differs,
    ),
    Architecture(
        name="ernie4_5-moe",
        model_types=("ernie4_5_moe",),
        modules=pre_norms(
            attention(),
            (
                *of_kind("dense", gated()),
                *of_kind(
                    "experts",
                    (
                        router("mlp.gate"),
                        replace(
                            correction("mlp.moe_statics.e_score_correction_bias"),
                            shape=(_one, "expert_count"),
                        ),
                        *experts(),
                        *(
                            replace(
                                module, when=lambda config: config["moe_num_shared_experts"] > 0
                            )
                            for module in gated(name="mlp.shared_experts", inner=_SHARED_INNER)
                        ),
                    ),
                ),
            ),
        ),
        layer_kinds=leading_dense("moe_layer_start_index"),
        sizes={
            "expert_count": "moe_num_experts",
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_feed_forward_length": lambda config: (
                int(config["moe_intermediate_size"]) * int(config["moe_num_shared_experts"])
            ),
        },
        copied={"expert_used_count": "moe_k"},
        more=_ernie,
        fixed={**SILU, "use_bias": (False,), "moe_layer_interval": (1,)},
        unsupported=_ernie_differs,
    ),
    Architecture(
        name="minimax-m2",
        model_types=("minimax_m2",),
        modules=pre_norms(
            (*attention(), norm("self_attn.q_norm", "q"), norm("self_attn.k_norm", "kv")),
            (
                *mixtral_experts("inner"),
                correction("block_sparse_moe.e_score_correction_bias"),
            ),
        ),
        sizes={
            "expert_count": "num_local_experts",
            "expert_feed_forward_length": "intermediate_size",
        },
        copied=_USED,
        more=lambda config, dimensions, rope: {"expert_gating_func": SIGMOID},
        fixed={**SILU, "attention_bias": (False,)},
        partial_rope=True,
        output="needed",
    ),
    Architecture(
        name="granitemoe",
        model_types=("granitemoe",),
        modules=pre_norms(
            attention("attention_bias", "attention_bias", interleave),
            (
                router("block_sparse_moe.router.layer"),
                *experts("block_sparse_moe.experts", inner="inner"),
            ),
        ),
        sizes={"expert_count": "num_local_experts"},
        copied={
            **_USED,
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        fixed=SILU,
        ropes=LLAMA3_ROPES,
    ),
    Architecture(
        name="hunyuan-moe",
        model_types=("hunyuan_v1_moe",),
        modules=pre_norms(
            (
                *attention(),
                norm("self_attn.query_layernorm", "head"),
                norm("self_attn.key_layernorm", "head"),
            ),
            (
                router("mlp.gate.wg"),
                *experts(inner="inner"),
                *gated(name="mlp.shared_mlp"),
            ),
        ),
        sizes={
            "expert_count": lambda config: _one_of(config["num_experts"]),
            "expert_feed_forward_length": "intermediate_size",
            "expert_shared_feed_forward_length": "intermediate_size",
        },
        more=_hunyuan_used,
        unsupported=_hunyuan_differs,
        fixed={**SILU, "attention_bias": (False,)},
        ropes=("default", "linear", "yarn"),
    ),
)
