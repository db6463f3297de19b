"""LoRA adapters of tiny models, and what PEFT makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from quantkit.checkpoint.reader import Checkpoint
from quantkit.lora.adapter import Adapter
from quantkit.lora.checkpoint import AdaptedCheckpoint
from quantkit.model.skeleton import Skeleton
from tests.helpers.tiny import Tiny

CHANGES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"num_key_value_heads": 2},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "gemma2": {},
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "patterns": (
        "llama",
        {
            "target_modules": ATTENTION,
            "rank_pattern": {"q_proj": 3, "layers.1.self_attn.v_proj": 6},
            "alpha_pattern": {"k_proj": 5, "^model.layers.0.self_attn.q_proj": 32},
        },
    ),
    "rslora": ("llama", {"target_modules": ATTENTION, "use_rslora": True}),
    "dora": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "regex": ("llama", {"target_modules": r".*\.[02]\.mlp\.(up|down)_proj"}),
    "excluded": ("llama", {"target_modules": ATTENTION, "exclude_modules": ["k_proj"]}),
    "some-layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}),
    "one-layer": (
        "llama",
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    ),
    "saved": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    ),
    "embeddings": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 90]}),
    "tokens-of-both": (
        "llama",
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [5], "lm_head": [1, 2]},
        },
    ),
    "mica": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "mica"}),
    "bias-all": ("qwen2", {"target_modules": ATTENTION, "bias": "all"}),
    "bias-lora-only": ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "lora-bias": ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True}),
    "qwen2-dora": ("qwen2", {"target_modules": "all-linear", "use_dora": True}),
    "conv1d": ("gpt2", {"target_modules": "all-linear", "fan_in_fan_out": True}),
    "conv1d-undeclared": ("gpt2", {"target_modules": ["c_attn", "attn.c_proj", "mlp.c_proj"]}),
    "conv1d-dora": (
        "gpt2",
        {"target_modules": "all-linear", "fan_in_fan_out": True, "use_dora": True, "bias": "all"},
    ),
    "conv1d-head": (
        "gpt2",
        {"target_modules": ["c_proj", "lm_head"], "ensure_weight_tying": False},
    ),
    "gemma2": ("gemma2", {"target_modules": "all-linear"}),
    "gemma2-dora": ("gemma2", {"target_modules": ["q_proj", "mlp.down_proj"], "use_dora": True}),
}


def base_of(
    tiny: Tiny, model_type: str, dtype: torch.dtype = torch.float32, **changes: object
) -> Path:
    """A tiny base model, of the sizes that the options of this module fit."""
    return tiny(model_type, dtype, **{**CHANGES[model_type], **changes})


def train(
    base: Path, out: Path, config: dict[str, Any], *, seed: int = 1, vocabulary: int = 0
) -> Path:
    """Save a random adapter of ``base``, as if trained: everything trainable differs."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if vocabulary:
        model.resize_token_embeddings(vocabulary)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **config}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(out)
    return out


def adapted(base: Path, *adapters: Path | tuple[Path, float], **options: Any) -> AdaptedCheckpoint:
    """A base with adapters in it; a pair is an adapter and its weight."""
    checkpoint = Checkpoint(base)
    skeleton = Skeleton(checkpoint)
    opened = [Adapter.open(*a) if isinstance(a, tuple) else Adapter.open(a) for a in adapters]
    return AdaptedCheckpoint(checkpoint, opened, skeleton.names, skeleton.model, **options)


def load(base: Path, *, untie: bool = False) -> PreTrainedModel:
    """The whole base in float32; ``untie``: with an output matrix of its own."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if untie:
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    return model


def merged_by_peft(model: PreTrainedModel, adapter: Path) -> dict[str, torch.Tensor]:
    """The weights as PEFT merges them, the oracle of our merging."""
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


def assert_equal_to(oracle: dict[str, torch.Tensor], result: AdaptedCheckpoint) -> None:
    """Every tensor within 1e-6 of the largest weight; bfloat16 within one unit in the last."""
    names = Skeleton(result.base).names
    assert set(names) == set(oracle)
    for name, expected in oracle.items():
        key = result.key(name)
        actual = result.read_float32(key)
        assert actual.shape == expected.shape == result.shape(key), name
        assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max(), name


def units_apart(one: torch.Tensor, other: torch.Tensor) -> int:
    """The largest distance of two bfloat16 tensors, counted in representable values."""
    ordered = [
        torch.where(bits < 0, -(bits & 0x7FFF), bits)
        for bits in (t.view(torch.int16).to(torch.int32) for t in (one, other))
    ]
    return int((ordered[0] - ordered[1]).abs().max())


def rewrite(
    directory: Path,
    *,
    drop: Callable[[str], bool] = lambda key: False,
    rename: Callable[[str], str] = lambda key: key,
) -> None:
    """Damage the tensors of a saved adapter."""
    path = directory / "adapter_model.safetensors"
    tensors = {rename(k): t for k, t in load_file(path).items() if not drop(k)}
    save_file(tensors, path)


def configure(directory: Path, **changes: object) -> None:
    """Change keys of a saved adapter\'s configuration."""
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
