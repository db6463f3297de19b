"""Tiny seeded random models of many architectures, saved as checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 32, "sliding_window": 8},
    "gpt_neox": {},
    "bloom": {"n_head": 4, "n_layer": 3},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "olmo2": {"num_key_value_heads": 2},
}
# Layers that hand each other keys and values.
SHARING: dict[str, dict[str, Any]] = {
    "gemma4_text": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 16,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 96,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 8,
    },
}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
    "qwen3_moe": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "gpt_oss": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "glm4_moe": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "granitemoe": {"num_key_value_heads": 2, "num_local_experts": 4},
    "llama4_text": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 4,
        "intermediate_size_mlp": 96,
    },
    "nemotron_h": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
        "layers_block_type": ["mamba", "attention", "moe"],
    },
}
# Multimodal models: the texts' and the images' part of the config.
_TEXT = {**COMMON, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_GATES = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
_QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "deepstack_visual_indexes": [0],
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
WRAPPERS: dict[str, dict[str, Any]] = {
    "qwen3_5": {"text_config": {**_TEXT, **_GATES}, "vision_config": _QWEN_VISION},
    "qwen3_5_moe": {
        "text_config": {**_TEXT, **_GATES, **_EXPERTS, "shared_expert_intermediate_size": 32},
        "vision_config": _QWEN_VISION,
    },
    "qwen3_vl_moe": {
        "text_config": {**_TEXT, **_EXPERTS, "rope_parameters": _ROPE},
        "vision_config": _QWEN_VISION,
    },
    "mistral3": {"text_config": {**_TEXT, "model_type": "mistral"}, "vision_config": _VISION},
    "internvl": {"text_config": {**_TEXT, "model_type": "qwen2"}, "vision_config": _VISION},
    "smolvlm": {"text_config": {**_TEXT, "model_type": "llama"}, "vision_config": _VISION},
}


class Tiny(Protocol):
    """The fixture ``tiny``: the checkpoint of a model type, with changes to its config."""

    def __call__(
        self, model_type: str, dtype: torch.dtype = torch.float32, **changes: object
    ) -> Path: ...


def build(model_type: str, directory: Path, *, dtype: torch.dtype, **changes: object) -> Path:
    """Save a tiny random model of ``model_type`` to ``directory``."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(0)
    wrapper = WRAPPERS.get(model_type)
    settings = wrapper or {**COMMON, **(ARCHITECTURES | MIXTURES | SHARING).get(model_type, {})}
    config = AutoConfig.for_model(model_type, **{**settings, **changes})
    config.dtype = dtype
    wraps = wrapper or "text_config" in changes
    kind = AutoModelForImageTextToText if wraps else AutoModelForCausalLM
    model = kind.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.isfinite().all():  # some are made of whatever memory held
                parameter.copy_(torch.randn_like(parameter) * 0.05)
            if "norm" in name:  # norms of exactly one would hide mistakes in folding
                parameter.add_(torch.rand_like(parameter) * 0.5)
    model.save_pretrained(directory)
    return directory
