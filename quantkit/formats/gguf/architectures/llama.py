"""Llama and the models that add little to it: RMSNorms before attention and MLP."""

from __future__ import annotations

from quantkit.base.errors import InputError
from quantkit.formats.gguf.architectures.architecture import Architecture, Metadata
from quantkit.formats.gguf.architectures.modules import (
    LLAMA3_ROPES,
    SILU,
    attention,
    gated,
    interleave,
    linear,
    mixtral_experts,
    norm,
    pre_norms,
)
from quantkit.formats.gguf.architectures.parts import Config, Dimensions, of_kind
from quantkit.formats.gguf.rope import Rope, read_rope


def smollm3_differs(config: Config, dimensions: Dimensions) -> str | None:
    """How a model differs from the graph, which rotates nothing in every fourth layer."""
    without = [int((layer + 1) % 4 != 0) for layer in range(dimensions.layers)]
    given, interval = config.get("no_rope_layers"), config.get("no_rope_layer_interval", 4)
    if given not in (None, without) or (given is None and interval != 4):
        return "no_rope_layers other than every fourth"
    return None


def ministral_keys(config: Config, dimensions: Dimensions, rope: Rope) -> Metadata:
    """Queries grow with their position, and q and k aren't scaled as YaRN would have it."""
    if rope.settings.get("mscale", 1.0) != 1.0:
        raise InputError(
            f"yarn rope with mscale {rope.settings['mscale']} can't be written as GGUF",
            where="config.json",
        )
    return {
        "rope.scaling.yarn_log_multiplier": rope.number("mscale_all_dim"),
        "rope.scaling.attn_factor": None,  # follows from the multiplier
        "attention.temperature_scale": rope.number("llama_4_scaling_beta"),
    }


def hunyuan_differs(config: Config, dimensions: Dimensions) -> str | None:
    """How a model differs from the graph, which knows one base of the frequencies."""
    rope = read_rope(config)
    if rope.kind == "dynamic" and not rope.settings.get("alpha"):
        return "rope type 'dynamic' without alpha"
    return None


def hunyuan_keys(config: Config, dimensions: Dimensions, rope: Rope) -> Metadata:
    """A base of the frequencies that is stretched once and for all."""
    if rope.kind != "dynamic":
        return {}
    width = dimensions.head_dim
    # Tencent's configs name 32k positions of the 256k that the frequencies are stretched for.
    context = config["max_position_embeddings"]
    stretched = rope.theta == 10000.0 and context == 1 << 15
    return {
        "context_length": 1 << 18 if stretched else context,
        "rope.freq_base": rope.theta * rope.number("alpha") ** (width / (width - 2)),
        "rope.scaling.type": "none",
        "rope.scaling.factor": 1.0,
        "rope.scaling.original_context_length": 1 << 18 if stretched else context,
    }


def kind_of(config: Config) -> str:
    """The kind of all layers: Mixtral's have experts."""
    return "experts" if config.get("num_local_experts") else "dense"


def experts_used(config: Config, dimensions: Dimensions, rope: Rope) -> Metadata:
    """How many experts a token goes through, which only Mixtral's files say."""
    if not dimensions.own["expert_count"]:
        return {}
    return {"expert_used_count": int(config.get("num_experts_per_tok") or 0)}


LLAMA = (
    Architecture(
        name="llama",
        model_types=("llama", "mistral", "mixtral"),
        modules=pre_norms(
            attention("attention_bias", "attention_bias", interleave),
            (
                *of_kind("dense", gated("mlp_bias")),
                *of_kind("experts", mixtral_experts("inner")),
            ),
        ),
        layer_kinds=lambda config, layers: [kind_of(config)] * layers,
        sizes={"expert_count": lambda config: int(config.get("num_local_experts") or 0)},
        more=experts_used,
        fixed=SILU,
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
        name="mistral3",
        model_types=("ministral3",),
        modules=pre_norms(attention(change=interleave), gated()),
        fixed=SILU,
        ropes=("yarn",),
        more=ministral_keys,
    ),
    Architecture(
        name="seed_oss",
        model_types=("seed_oss",),
        modules=pre_norms(attention(qkv="attention_bias"), gated()),
        fixed={**SILU, "attention_out_bias": (False,), "mlp_bias": (False,)},
    ),
    Architecture(
        name="ernie4_5",
        model_types=("ernie4_5",),
        modules=pre_norms(attention(), gated()),
        fixed={**SILU, "use_bias": (False,)},
    ),
    Architecture(
        name="hunyuan-dense",
        model_types=("hunyuan_v1_dense",),
        modules=(
            norm("input_layernorm"),
            *attention(),
            norm("self_attn.query_layernorm", "head"),
            norm("self_attn.key_layernorm", "head"),
            norm("post_attention_layernorm"),
            *gated(),
        ),
        fixed={**SILU, "attention_bias": (False,)},
        ropes=("default", "linear", "yarn", "dynamic"),
        more=hunyuan_keys,
        unsupported=hunyuan_differs,
    ),
)
