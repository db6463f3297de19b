"""The checkpoints that artifacts are made of: the demo, and small random ones of other shapes.

The random ones have what the demo lacks and engines fuse or rename: biases, norms of queries and
keys, one linear for queries, keys and values, experts. Their tokenizer and end tokens are the
demo's.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from quantkit.base.resources import demo_model

DEMO = "demo"
_SIZES = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 4,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
# All experts count for every token: where engines round, nearly equal ones would change places.
_EXPERTS = {"num_experts_per_tok": 4, "intermediate_size": 256, "moe_intermediate_size": 256}
RANDOM: dict[str, dict[str, int]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "phi3": {},
    "qwen3_moe": {**_EXPERTS, "num_experts": 4, "head_dim": 128, "norm_topk_prob": True},
    "mixtral": {**_EXPERTS, "num_local_experts": 4},
}
MIXTURES = ("qwen3_moe", "mixtral")
_OF_THE_DEMO = (
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def checkpoint_of(name: str, work: Path) -> Path:
    """The directory of a checkpoint. A random one is made in ``work`` unless it is there."""
    if name == DEMO:
        return demo_model()
    # llama.cpp expects the tokens of Phi-3 in a model of that name, hence the folder "random".
    directory = work / "models" / name / "random"
    if not (directory / "config.json").is_file():
        _build(name, directory)
    return directory


def _build(name: str, directory: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**_SIZES, **RANDOM[name]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.add_(torch.rand_like(parameter) * 0.5)
            elif key.endswith("bias"):
                parameter.normal_(std=0.5)
            else:  # wide enough for attention that isn't even, and for logits that differ
                parameter.normal_(std=0.08)
    model.save_pretrained(directory)
    for pattern in _OF_THE_DEMO:
        for file in demo_model().glob(pattern):
            shutil.copy(file, directory / file.name)
