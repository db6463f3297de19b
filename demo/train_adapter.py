"""Train the demo adapter, a LoRA of the demo model: `python demo/train_adapter.py`.

Needs `pip install peft`, a CPU and about ten minutes. Everything is seeded; the last bits of the
factors may still differ between machines, because matrix products may sum in another order.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent))

import skill
import train
import world

ADAPTER_DIR = Path(__file__).resolve().parent / "adapter"
SEED = 0
RANK = 8


def tokenized(tokenizer: Any, texts: Iterable[str]) -> list[tuple[list[int], list[float]]]:
    """Turn texts into tokens and loss weights, as the base was trained on its own."""
    separator, assistant, end_of_turn = tokenizer.convert_tokens_to_ids(
        [world.END_OF_TEXT, "<|assistant|>", world.END_OF_TURN]
    )
    documents = []
    for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
        ids = [*ids, separator]
        documents.append((ids, train.token_weights(ids, assistant, end_of_turn)))
    return documents


def load_base() -> Any:
    """The committed demo model, in float32."""
    return AutoModelForCausalLM.from_pretrained(train.MODEL_DIR, dtype=torch.float32)


def save(model: Any, directory: Path) -> None:
    """Save factors and configuration only, so that nothing in them depends on this machine."""
    model.to(torch.bfloat16).save_pretrained(directory, save_embedding_layers=False)
    (directory / "README.md").unlink()
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = "demo"
    config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8", newline="\n")


def load_merged(directory: Path) -> Any:
    """Fold the saved adapter into the base and round once to BF16, as a merged release would be."""
    model: Any = PeftModel.from_pretrained(load_base(), directory)
    return model.merge_and_unload().to(torch.bfloat16).float()


@torch.no_grad()
def passed(model: Any, tokenizer: Any, case: dict[str, Any]) -> bool:
    """Whether the model passes a case; prints the answer where it doesn't."""
    text = case.get("prompt") or tokenizer.apply_chat_template(
        case["messages"], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=case["max_new_tokens"]
    )
    answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    good = train.passes(case["check"], answer)
    if not good:
        print(f"failed {case['id']}: {answer!r} does not meet {case['check']}")
    return good


def report(directory: Path) -> None:
    """Print how many cases pass: of the skill without and with the adapter, of the base with it."""
    tokenizer = AutoTokenizer.from_pretrained(train.MODEL_DIR)
    base, merged = load_base(), load_merged(directory)
    skill_cases = [case for case in skill.regression_cases() if "adapter" in case["tags"]]
    for name, model, cases in (
        ("base on the skill's cases", base, skill_cases),
        ("base and adapter on the skill's cases", merged, skill_cases),
        ("base and adapter on the base's own cases", merged, world.regression_cases()),
    ):
        good = Counter(passed(model, tokenizer, case) for case in cases)[True]
        print(f"{name}: {good} of {len(cases)} ({good / len(cases):.1%})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ADAPTER_DIR)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(SEED)

    tokenizer = AutoTokenizer.from_pretrained(train.MODEL_DIR)
    documents = tokenized(tokenizer, skill.training_documents())
    config = LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"
    )
    model = get_peft_model(load_base(), config)
    print(
        f"{len(documents)} documents, {sum(len(ids) for ids, _ in documents)} tokens, "
        f"{sum(p.numel() for p in model.parameters() if p.requires_grad)} parameters to train"
    )
    train.train(model, documents, steps=arguments.steps, rows=arguments.rows, peak=arguments.rate)
    save(model, arguments.output)
    report(arguments.output)


if __name__ == "__main__":
    main()
