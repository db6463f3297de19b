"""More trained models and text of another kind, so that no method is tuned to one of each.

    python -m benchmarks.trained DIR [MODEL] [--steps N]

trains ``DIR/MODEL`` and writes ``DIR/calibration.txt`` and ``DIR/heldout.txt``. The models are
``gpt-neox-20m`` (parallel residual, LayerNorm, plain GELU MLP, biases, rotation of a quarter of
each head), and ``qwen3-moe-10m``, a mixture of 8 experts of which each token takes 2. The text is
the docstrings of Python's standard library, of torch and of transformers, which everybody who runs
this has. The digest of a file's name decides whether its docstrings are training, calibration or
held-out text. It takes twenty minutes on two CPU cores. The training is seeded, but other versions
of these packages have other docstrings.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

# The demo's scripts are no package and import one another as neighbors.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))

from train import train

PACKAGES = ("torch", "transformers")
VOCABULARY = 4096
END = "<|endoftext|>"
SHORTEST = 200  # characters; shorter docstrings are left out
HELD = 16  # one file in 16 is calibration text, and one is held-out text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("model", nargs="?", choices=MODELS, default="gpt-neox-20m")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--rows", type=int, default=16, help="of 256 tokens in a step")
    options = parser.parse_args()
    torch.manual_seed(0)
    texts: dict[str, list[str]] = {"training": [], "calibration": [], "heldout": []}
    for name, text in docstrings():
        texts[part(name)].append(text)
    options.directory.mkdir(parents=True, exist_ok=True)
    for name in ("calibration", "heldout"):
        path = options.directory / f"{name}.txt"
        path.write_text("\n\n".join(texts[name]), encoding="utf-8")
    tokenizer = build_tokenizer(texts["training"])
    ids = tokenizer([text + END for text in texts["training"]])["input_ids"]
    model = MODELS[options.model]()
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(ids)} docstrings, {sum(map(len, ids))} tokens, {size} parameters", flush=True)
    documents = [(row, [1.0] * len(row)) for row in ids]
    train(model, documents, steps=options.steps, rows=options.rows, peak=1e-3)
    # The balance of the experts matters in training alone; engines needn't compute it.
    model.config.output_router_logits = False
    model.to(torch.bfloat16).save_pretrained(options.directory / options.model)
    tokenizer.save_pretrained(options.directory / options.model)


def docstrings() -> Iterator[tuple[str, str]]:
    """(file, docstring) of every module, class and function, in a fixed order."""
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None
        roots.append(Path(spec.origin).parent)
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            name = path.relative_to(root.parent).as_posix()
            if "site-packages" in path.relative_to(root).parts or "test" in name:
                continue
            try:
                with warnings.catch_warnings(action="ignore"):
                    tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError, ValueError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    text = ast.get_docstring(node)
                    if text and len(text) >= SHORTEST:
                        yield name, text


def part(name: str) -> str:
    """The text that a file's docstrings belong to: "training", "calibration" or "heldout"."""
    place = hashlib.sha256(name.encode()).digest()[0] % HELD
    return {0: "calibration", 1: "heldout"}.get(place, "training")


def build_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE with GPT-2's pre-tokenizer, learned on ``texts``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=2048)


def gpt_neox() -> Any:
    """A GPT-NeoX of 20 million parameters with random weights."""
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=5,
        num_attention_heads=8,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: Any = GPTNeoXForCausalLM(config)
    return model


def qwen3_moe() -> Any:
    """A Qwen3-MoE of 10 million parameters with random weights; a token uses 4 million of them."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        moe_intermediate_size=256,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        output_router_logits=True,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    config._experts_implementation = "eager"  # the others have no bfloat16 gradients on a CPU
    model: Any = Qwen3MoeForCausalLM(config)
    return model


MODELS: dict[str, Callable[[], Any]] = {"gpt-neox-20m": gpt_neox, "qwen3-moe-10m": qwen3_moe}


if __name__ == "__main__":
    main()
