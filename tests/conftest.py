"""Tiny seeded random models, made once a session and saved as checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
ARCHITECTURES = {
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 32, "sliding_window": 8},
    "gpt_neox": {},
    "bloom": {"n_head": 4, "n_layer": 3},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "olmo2": {"num_key_value_heads": 2},
}


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


@pytest.fixture(autouse=True, scope="session")
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory):
    """Tests leave the user's cache alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    """A function from a model type (and config changes) to a checkpoint directory."""
    made: dict[str, Path] = {}

    def make(model_type: str, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
        key = f"{model_type}-{dtype}-{sorted(changes.items())}"
        if key not in made:
            made[key] = build(
                model_type, tmp_path_factory.mktemp(model_type), dtype=dtype, **changes
            )
        return made[key]

    return make
