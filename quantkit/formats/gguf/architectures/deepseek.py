"""DeepSeek's mixtures of experts, and GLM's, whose routers are of the same kind."""

from __future__ import annotations

from dataclasses import replace

from quantkit.formats.gguf.architectures.architecture import Architecture, Metadata
from quantkit.formats.gguf.architectures.modules import (
    SIGMOID,
    SILU,
    SOFTMAX,
    attention,
    correction,
    experts,
    gated,
    leading_dense,
    linear,
    norm,
    pre_norms,
    router,
)
from quantkit.formats.gguf.architectures.parts import Config, Dimensions, Module, of_kind
from quantkit.formats.gguf.rope import Rope, read_rope
from quantkit.formats.gguf.transforms import HeadPart, Transform

_RANK, _KEY, _VALUE = (
    *("attention.kv_lora_rank", "attention.key_length_mla"),
    "attention.value_length_mla",
)
_USED = {"expert_used_count": "num_experts_per_tok"}


def _groups(config: Config) -> Metadata:
    """Groups of experts, and those that a token's are chosen from, unless these are all."""
    count, used = int(config.get("n_group") or 1), int(config.get("topk_group") or 1)
    count, used = (1, 1) if count == used else (count, used)
    return {"expert_group_count": count, "expert_group_used_count": used}


def _scaled(config: Config, dimensions: Dimensions, rope: Rope) -> Metadata:
    """How GLM's routers choose experts and weigh them."""
    return {
        "expert_gating_func": SIGMOID,
        **_groups(config),
        "expert_weights_norm": bool(config["norm_topk_prob"]),
        "expert_weights_scale": float(config["routed_scaling_factor"]),
        "leading_dense_block_count": int(config.get("first_k_dense_replace") or 0),
    }


def _shared(dimensions: Dimensions) -> int:
    """The width of GLM's shared experts, which are one MLP."""
    return dimensions.own["expert_shared_count"] * dimensions.own["expert_feed_forward_length"]


def _queries(dimensions: Dimensions) -> int:
    return dimensions.heads * dimensions.own[_KEY]


def _latent_rows(dimensions: Dimensions) -> int:
    return dimensions.own[_RANK] + dimensions.own["rope.dimension_count"]


def _kv_rows(dimensions: Dimensions) -> int:
    return dimensions.heads * sum(_head_rows(dimensions))


def _value_columns(dimensions: Dimensions) -> int:
    return dimensions.heads * dimensions.own[_VALUE]


def _key_part(dimensions: Dimensions) -> Transform:
    """The rows of kv_b that make keys: llama.cpp multiplies queries by them, transposed."""
    nope, value = _head_rows(dimensions)
    return HeadPart(dimensions.heads, nope + value, 0, nope, transposed=True)


def _value_part(dimensions: Dimensions) -> Transform:
    nope, value = _head_rows(dimensions)
    return HeadPart(dimensions.heads, nope + value, nope, nope + value)


def _head_rows(dimensions: Dimensions) -> tuple[int, int]:
    """The rows that a head has in kv_b for its keys and for its values."""
    own = dimensions.own
    return own[_KEY] - own["rope.dimension_count"], own[_VALUE]


def _latent(config: Config, dimensions: Dimensions, rope: Rope) -> Metadata:
    """Multi-head latent attention as llama.cpp computes it: one head of keys for all queries."""
    rank, rotated = dimensions.own[_RANK], dimensions.own["rope.dimension_count"]
    third = config["model_type"] == "deepseek_v3"
    values: Metadata = {
        "attention.head_count_kv": 1,
        "attention.key_length": rank + rotated,
        "attention.value_length": rank,
        "attention.q_lora_rank": dimensions.own["attention.q_lora_rank"],
        "expert_gating_func": SIGMOID if third else SOFTMAX,
        **_groups(config if third else {}),
        "expert_weights_norm": third and bool(config["norm_topk_prob"]),
        "expert_weights_scale": float(config["routed_scaling_factor"]),
        "leading_dense_block_count": int(config.get("first_k_dense_replace") or 0),
    }
    if rope.kind == "yarn":
        # llama.cpp takes this factor for both of transformers', and finds the attention's with it.
        values["rope.scaling.yarn_log_multiplier"] = 0.1 * rope.number("mscale_all_dim")
        values["rope.scaling.attn_factor"] = None
    return values


def _deepseek_differs(config: Config, dimensions: Dimensions) -> str | None:
    """How a model differs from the graph, which tells some models by their size."""
    rope, layers = read_rope(config), dimensions.layers
    scales = [rope.settings.get(key) for key in ("mscale", "mscale_all_dim", "attention_factor")]
    if rope.kind == "yarn" and (not scales[1] or scales[0] != scales[1] or scales[2] is not None):
        return "yarn rope whose mscale isn't mscale_all_dim"
    lite = layers in (26, 27) or (layers == 48 and dimensions.vocabulary == 128256)
    if lite and config.get("q_lora_rank"):
        return f"q_lora_rank with {layers} layers"
    if config["model_type"] == "deepseek_v3":
        return None
    if config.get("norm_topk_prob"):
        return "norm_topk_prob (transformers has no use for it in deepseek_v2)"
    method, groups = config.get("topk_method", "greedy"), config.get("n_group") or 1
    if method not in ("greedy", "group_limited_greedy") or (method != "greedy" and groups > 1):
        return f"topk_method {method!r} with n_group {groups}"
    return None


_LATENT_ATTENTION = (
    *(
        replace(module, when=lambda config: bool(config.get("q_lora_rank")))
        for module in (
            linear("self_attn.q_a_proj", "attention.q_lora_rank", "hidden"),
            norm("self_attn.q_a_layernorm", "attention.q_lora_rank"),
            Module("self_attn.q_b_proj", (_queries, "attention.q_lora_rank")),
        )
    ),
    Module(
        "self_attn.q_proj",
        (_queries, "hidden"),
        when=lambda config: not config.get("q_lora_rank"),
    ),
    Module("self_attn.kv_a_proj_with_mqa", (_latent_rows, "hidden")),
    norm("self_attn.kv_a_layernorm", _RANK),
    Module(
        "self_attn.kv_b_proj",
        (_kv_rows, _RANK),
        split=(("attn_k_b", _key_part), ("attn_v_b", _value_part)),
    ),
    Module("self_attn.o_proj", ("hidden", _value_columns)),
)

DEEPSEEK = (
    Architecture(
        name="glm4moe",
        model_types=("glm4_moe",),
        modules=(
            norm("input_layernorm"),
            *attention("attention_bias"),
            *(
                Module(
                    f"self_attn.{part}_norm", ("head",), when=lambda config: config["use_qk_norm"]
                )
                for part in "qk"
            ),
            norm("post_attention_layernorm"),
            *of_kind("dense", gated()),
            *of_kind(
                "experts",
                (
                    router("mlp.gate"),
                    correction("mlp.gate.e_score_correction_bias"),
                    *experts(),
                    *gated(name="mlp.shared_experts", inner=_shared),
                ),
            ),
        ),
        layer_kinds=leading_dense("first_k_dense_replace"),
        sizes={
            "expert_count": "n_routed_experts",
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_count": "n_shared_experts",
        },
        copied=_USED,
        more=_scaled,
        fixed=SILU,
        partial_rope=True,
    ),
    Architecture(
        name="deepseek2",
        model_types=("deepseek_v3", "deepseek_v2"),
        modules=pre_norms(
            _LATENT_ATTENTION,
            (
                *of_kind("dense", gated()),
                *of_kind(
                    "experts",
                    (
                        router("mlp.gate"),
                        replace(
                            correction("mlp.gate.e_score_correction_bias"),
                            when=lambda config: config["model_type"] == "deepseek_v3",
                        ),
                        *experts(),
                        *gated(name="mlp.shared_experts", inner=_shared),
                    ),
                ),
            ),
        ),
        layer_kinds=leading_dense("first_k_dense_replace"),
        sizes={
            "expert_count": "n_routed_experts",
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_count": "n_shared_experts",
            "attention.q_lora_rank": lambda config: int(config.get("q_lora_rank") or 0),
            _RANK: "kv_lora_rank",
            _KEY: lambda config: int(config["qk_nope_head_dim"]) + int(config["qk_rope_head_dim"]),
            _VALUE: "v_head_dim",
            "rope.dimension_count": "qk_rope_head_dim",
        },
        copied=_USED,
        more=_latent,
        fixed={**SILU, "attention_bias": (False,), "rope_interleave": (True,)},
        ropes=("default", "yarn"),
        unsupported=_deepseek_differs,
    ),
)
