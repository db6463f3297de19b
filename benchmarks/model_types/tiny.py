"""Tiny random checkpoints of any model type, by making every size of its default config small."""

from __future__ import annotations

import string
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

LAYERS = 3
VOCABULARY = 1024
_SIZES: dict[str, int] = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 256,
    "intermediate_size_mlp": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 2,
    "head_dim": 64,
    "global_head_dim": 64,
    "qk_head_dim": 64,
    "max_position_embeddings": 256,
    "sliding_window": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "decoder_sparse_step": 1,
    # latent attention
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    # linear attention and state spaces
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "mamba_n_heads": 8,
    "mamba_d_head": 64,
    "mamba_d_state": 32,
    "ssm_state_size": 32,
    "n_groups": 1,
    "n_mamba_heads": 8,
    "attention_hidden_size": 256,
    "attention_head_dim": 64,
    # embeddings of each layer, shared keys and values
    "hidden_size_per_layer_input": 32,
    "num_kv_shared_layers": 0,
    # older spellings
    "decoder_layers": LAYERS,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 256,
    "n_embd": 256,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 256,
    "d_model": 256,
    "d_inner": 256,
    "emb_dim": 256,
    "n_layers": LAYERS,
    "n_heads": 4,
    "ffn_dim": 256,
    "word_embed_proj_dim": 256,
    # images
    "image_size": 28,
    "patch_size": 14,
    "depth": 2,
    "embed_dim": 64,
    "num_heads": 4,
    "out_hidden_size": 256,
}
_IMAGES = {
    **_SIZES,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 64,
}
_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type")
_TEXT_PARTS = ("text", "llm", "language")
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_MROPE = {**_ROPE, "mrope_section": [8, 12, 12]}
# By the model type of a configuration or of a part of one.
_SPECIAL: dict[str, dict[str, Any]] = {
    "axk1": {"head_dim": 32},
    "blt": {"vocab_size": 260},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "deepseek_v2": {"head_dim": 32},
    "deepseek_v3": {"head_dim": 32},
    "ernie4_5_vl_moe_text": {"rope_parameters": {**_ROPE, "mrope_section": [12, 12, 8]}},
    "falcon_h1": {"mamba_d_ssm": 256, "mamba_n_heads": 8, "mamba_d_head": 32},
    "glm4v_moe_text": {"rope_parameters": {**_MROPE, "partial_rotary_factor": 1.0}},
    "glm5_next_text": {"qk_rope_head_dim": 0},
    "gpt_neo": {
        "num_layers": LAYERS,
        "attention_types": [[["global", "local"], 1], [["global"], 1]],
    },
    "hunyuan_v1_moe": {"rope_parameters": _ROPE},
    "hunyuan_vl_text": {"rope_parameters": {**_ROPE, "mrope_section": [8, 8, 8, 8]}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "full_attention"]},
    "longcat_flash": {"head_dim": 32},
    "mamba2": {"num_heads": 8, "head_dim": 64},
    "paddleocr_vl_text": {"rope_parameters": _MROPE},
    "qwen2_5_omni_text": {"rope_parameters": _MROPE},
    "qwen2_5_vl_text": {"rope_parameters": _MROPE},
    "qwen2_vl_text": {"rope_parameters": _MROPE},
    "reformer": {"is_decoder": True},
    "xmod": {"default_language": "en_XX", "is_decoder": True},
    "youtu": {"head_dim": 32},
    "zamba": {
        "layers_block_type": ["hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": 512,
        "attention_head_dim": 128,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
        "attention_hidden_size": 512,
        "attention_head_dim": 128,
        "n_mamba_heads": 8,
        "mamba_headdim": 64,
    },
    "zaya": {"num_experts_per_tok": 1},
}
_LETTERS = string.printable[:95]


def config_of(model_type: str, kind: Any) -> Any:
    """The default config of a model type with small sizes; ``kind``: the class to be built."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type)
    text = config.get_text_config(decoder=True)
    if not isinstance(config, kind.config_class) and isinstance(text, kind.config_class):
        config = text  # the text part of a wrapper
    with suppress(Exception):  # some compute one key of others when they are made
        config = _made_anew(config, _SIZES)
    return _shrunk(config, _SIZES)


def _special(config: Any) -> dict[str, Any]:
    return _SPECIAL.get(config.model_type, {})


def _made_anew(config: Any, sizes: dict[str, int]) -> Any:
    keys: dict[str, Any] = {name: n for name, n in sizes.items() if name in config.to_dict()}
    keys |= _special(config)
    for name in getattr(config, "sub_configs", None) or {}:
        part = getattr(config, name, None)
        if part is not None and not isinstance(part, dict):
            small = _SIZES if any(word in name for word in _TEXT_PARTS) else _IMAGES
            keys[name] = _made_anew(part, small).to_dict()
    return type(config)(**keys)


def _shrunk(config: Any, sizes: dict[str, int]) -> Any:
    for name, size in sizes.items():
        # Some names can't be set, or are computed from others: these keep their value.
        with suppress(Exception):
            if type(getattr(config, name)) is int:
                setattr(config, name, size)
    count = sizes["num_hidden_layers"]
    for name in _LISTS:
        with suppress(Exception):
            given = getattr(config, name)
            kinds = list(dict.fromkeys(given))
            if len(given) != count:
                setattr(config, name, (kinds * count)[:count])
    with suppress(Exception):  # some have a rank of each layer's own
        if getattr(config, "kv_lora_rank", None):  # latent attention has no groups
            config.num_key_value_heads = sizes["num_attention_heads"]
    if isinstance(getattr(config, "intermediate_size", None), list):
        config.intermediate_size = [sizes["intermediate_size"]] * count
    if getattr(config, "activation_sparsity_pattern", None):
        config.activation_sparsity_pattern = [0.0] * count
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and rope.get("mrope_section"):
        rope["mrope_section"] = [8, 12, 12]
    for name in getattr(config, "sub_configs", None) or {}:
        part = getattr(config, name, None)
        if part is not None and not isinstance(part, dict):
            _shrunk(part, _SIZES if any(word in name for word in _TEXT_PARTS) else _IMAGES)
    for name, value in _special(config).items():
        setattr(config, name, value)
    return config


def build(model_type: str, class_name: str, directory: Path) -> None:
    """Save a tiny random model in BF16 to ``directory``, with a tokenizer of single letters."""
    import transformers

    torch.manual_seed(0)
    kind = getattr(transformers, class_name)
    model = kind._from_config(config_of(model_type, kind), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            dull = parameter.dim() >= 2 and float(parameter.std()) < 1e-3
            if dull or not parameter.isfinite().all():
                parameter.copy_(torch.randn_like(parameter) * 0.05)
            if "norm" in name and parameter.dim() == 1:  # exactly one would hide mistakes
                parameter.add_(torch.rand_like(parameter) * 0.3)
    model.to(torch.bfloat16).save_pretrained(directory)
    _tokenizer(directory)


def _tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split

    tokenizer = Tokenizer(WordLevel({letter: id + 3 for id, letter in enumerate(_LETTERS)}, " "))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.save(str(directory / "tokenizer.json"))
    config = '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    (directory / "tokenizer_config.json").write_text(config)
