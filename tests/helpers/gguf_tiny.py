"""Tiny checkpoints with tokenizers, wide enough for K-quants."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.helpers.tiny import build

GPT2 = "gpt-2"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind it at all.",
    "In 1998 there were 12345 foxes;  by 2026 nobody'd counted them again...",
    "def add(a, b):\n    return a + b\n\n\n\tprint(add(1, 22))",
    "Köln, naïve café, 北京, 🦙 and \t tabs",
]
VOCABULARY = 512

# Every model that can be written: with settings that would hide nothing (heads wider than
# hidden / heads where the architecture has them, windows shorter than the tests' texts).
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None, "head_dim": 96},
    "qwen2": {},
    "qwen3": {"head_dim": 96, "tie_word_embeddings": True},
    "gemma": {"head_dim": 96},
    "gemma2": {
        **{"head_dim": 96, "query_pre_attn_scalar": 96, "sliding_window": 24},
        "num_hidden_layers": 3,
    },
    "gemma3_text": {
        **{"head_dim": 96, "query_pre_attn_scalar": 96, "sliding_window": 24},
        "num_hidden_layers": 7,
    },
    "phi3": {"pad_token_id": 0},
    "smollm3": {"pad_token_id": 0, "num_hidden_layers": 5},
    "olmo2": {},
    "granite": {
        **{"embedding_multiplier": 6.0, "attention_multiplier": 0.09},
        **{"residual_multiplier": 0.4, "logits_scaling": 3.0},
    },
    "starcoder2": {},
    "gpt_neox": {"num_key_value_heads": 4},
    "ministral3": {
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
            **{"original_max_position_embeddings": 32, "beta_fast": 32.0, "beta_slow": 1.0},
            **{"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5},
        },
        "head_dim": 96,
    },
    "seed_oss": {"pad_token_id": 0, "head_dim": 96},
    "ernie4_5": {"pad_token_id": 0, "head_dim": 96},
    "hunyuan_v1_dense": {
        **{"pad_token_id": 0, "head_dim": 96},
        "rope_parameters": {
            "rope_type": "dynamic",
            "rope_theta": 1e4,
            "alpha": 50.0,
            "factor": 1.0,
        },
    },
    "olmo3": {
        **{"pad_token_id": 0, "sliding_window": 24},
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    "glm4": {"pad_token_id": 0, "head_dim": 96},
    "stablelm": {"use_qkv_bias": True},
    "bloom": {"n_layer": 2, "n_head": 4},
    "nemotron": {"attention_bias": True, "mlp_bias": True},
    "cohere": {"pad_token_id": 0, "logit_scale": 2.0},
    "cohere2": {
        **{"pad_token_id": 0, "logit_scale": 2.0, "sliding_window": 24},
        "num_hidden_layers": 5,
    },
    "olmo": {"pad_token_id": 0, "clip_qkv": 0.9},
    "phi": {"num_key_value_heads": 4},
    "qwen3_5_text": {
        **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "head_dim": 64},
        **{"linear_key_head_dim": 64, "linear_value_head_dim": 64, "pad_token_id": 0},
        "layer_types": ["linear_attention", "full_attention"],
    },
    "nemotron_h": {
        **{"pad_token_id": 0, "head_dim": 64, "mamba_num_heads": 8, "mamba_head_dim": 32},
        **{"ssm_state_size": 32, "n_groups": 2, "num_hidden_layers": 3, "n_routed_experts": 0},
        "layers_block_type": ["mamba", "attention", "mlp"],
    },
    "granitemoehybrid": {
        **{"pad_token_id": 0, "num_local_experts": 0, "shared_intermediate_size": 512},
        **{"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 32, "mamba_n_groups": 2},
        **{"layer_types": ["mamba", "attention"], "position_embedding_type": "rope"},
        **{"embedding_multiplier": 6.0, "attention_multiplier": 0.09},
        **{"residual_multiplier": 0.4, "logits_scaling": 3.0},
    },
    "lfm2": {"pad_token_id": 0, "layer_types": ["conv", "full_attention"]},
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
_HYBRID = {**MODELS["qwen3_5_text"], **_EXPERTS, "shared_expert_intermediate_size": 512}
# Models of images and text: the text model's settings, and the images'.
_TOWER = {
    **{"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
}
_QWEN_TOWER = {
    **{"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2},
    **{"out_hidden_size": 256, "deepstack_visual_indexes": [0]},
}
_SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [12, 10, 10]}
WRAPPED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": ({**MODELS["gemma3_text"], "model_type": "gemma3_text"}, _TOWER),
    "mistral3": ({**MODELS["mistral"], "model_type": "mistral"}, _TOWER),
    "qwen2_5_vl": ({"rope_parameters": _SECTIONS}, _QWEN_TOWER),
    "qwen3_vl": ({"head_dim": 64, "rope_parameters": _SECTIONS}, _QWEN_TOWER),
    "qwen3_5": ({**MODELS["qwen3_5_text"], "model_type": "qwen3_5_text"}, _QWEN_TOWER),
    "qwen3_5_moe": ({**_HYBRID, "model_type": "qwen3_5_moe_text"}, _QWEN_TOWER),
    "qwen3_vl_moe": ({**_EXPERTS, "head_dim": 64, "rope_parameters": _SECTIONS}, _QWEN_TOWER),
    "internvl": ({"model_type": "qwen3", "head_dim": 64}, _TOWER),
    "smolvlm": ({"model_type": "llama"}, _TOWER),
}


# Mixtures of experts, with layers of both kinds where a family has some.
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LATENT = {
    **{"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64},
    **{"num_key_value_heads": 4, "n_shared_experts": 1},
}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": _LOCAL,
    "qwen3_moe": {**_EXPERTS, "head_dim": 96, "norm_topk_prob": True},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 512},
    "olmoe": {**_EXPERTS, "num_key_value_heads": 4},
    "gpt_oss": {
        **{**_LOCAL, "head_dim": 64, "sliding_window": 24},
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
            "original_max_position_embeddings": 64,
        },
    },
    "glm4_moe": {
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256},
        **{"first_k_dense_replace": 1, "routed_scaling_factor": 1.5},
        **{"head_dim": 64, "use_qk_norm": True, "attention_bias": True},
    },
    "deepseek_v3": {
        **{"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256},
        **{"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, **_LATENT},
        **{"q_lora_rank": 96, "routed_scaling_factor": 1.5},
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 1.0},
            **{"mscale_all_dim": 1.0, "original_max_position_embeddings": 64},
        },
    },
    "deepseek_v2": {
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256},
        **{"first_k_dense_replace": 1, "q_lora_rank": None, **_LATENT},
    },
    "qwen3_5_moe_text": _HYBRID,
    "ernie4_5_moe": {
        **{"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 256},
        **{"moe_num_shared_experts": 2, "moe_layer_start_index": 1},
    },
    "minimax_m2": {**_LOCAL, "head_dim": 64, "rotary_dim": 32},
    "granitemoe": {
        **{**_LOCAL, "embedding_multiplier": 6.0, "attention_multiplier": 0.09},
        **{"residual_multiplier": 0.4, "logits_scaling": 3.0},
    },
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 64},
}
MODELS |= MIXTURES


def checkpoint(
    directory: Path,
    *,
    model_type: str = "llama",
    dtype: torch.dtype = torch.bfloat16,
    split: str | None = GPT2,
    bos: bool = False,
    **changes: Any,
) -> Path:
    """Save a random model with a tokenizer trained on ``TEXT``.

    ``split``: "gpt-2", a regex, or None for SentencePiece's kind of BPE.
    """
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.08,  # logits far enough apart for greedy ids to be compared
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    text = {**shape, **changes}
    if model_type in WRAPPED:
        own, tower = WRAPPED[model_type]
        build(
            model_type,
            directory,
            dtype=dtype,
            text_config={**text, **own, **changes},
            vision_config=tower,
            tie_word_embeddings=bool({**own, **changes}.get("tie_word_embeddings")),
        )
    else:
        build(model_type, directory, dtype=dtype, **text)
    _fill_biases(directory / "model.safetensors")
    _tokenizer(directory, split, bos)
    return directory


def change(directory: Path, target: Path, **changes: Any) -> Path:
    """Copy a checkpoint with a changed config; a value of None removes the key."""
    for file in directory.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text())
    config = {k: v for k, v in {**config, **changes}.items() if v is not None}
    (target / "config.json").write_text(json.dumps(config))
    return target


def _fill_biases(path: Path) -> None:
    """Biases start as zeros, which would hide mistakes in them."""
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(path)
    for key, tensor in tensors.items():
        if key.endswith("bias"):
            noise = torch.randn(tensor.shape, generator=generator) / 2
            tensors[key] = noise.to(tensor.dtype)
    save_file(tensors, path, metadata={"format": "pt"})


def _tokenizer(directory: Path, split: str | None, bos: bool) -> None:
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    special = ["<s>", "</s>", "<unk>"]
    if split is None:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        # Words are kept apart while training only, as SentencePiece does.
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        alphabet = []
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        tokenizer = Tokenizer(models.BPE())
        if split == GPT2:
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        else:
            steps = [
                pre_tokenizers.Split(Regex(split), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 40,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    data = json.loads(tokenizer.to_str())
    if split is None:
        data["pre_tokenizer"] = None
        data["added_tokens"] = data["added_tokens"][:3]
    (directory / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
