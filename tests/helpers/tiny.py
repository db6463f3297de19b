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


class Tiny(Protocol):
    """The fixture ``tiny``: the checkpoint of a model type, with changes to its config."""

    def __call__(
        self, model_type: str, dtype: torch.dtype = torch.float32, **changes: object
    ) -> Path: ...


def build(model_type: str, directory: Path, *, dtype: torch.dtype, **changes: object) -> Path:
    """Save a tiny random model of ``model_type`` to ``directory``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, **{**COMMON, **ARCHITECTURES.get(model_type, {}), **changes}
    )
    config.dtype = dtype
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # norms of exactly one would hide mistakes in folding
                parameter.add_(torch.rand_like(parameter) * 0.5)
    model.save_pretrained(directory)
    return directory
