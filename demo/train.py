"""Train the demo model from scratch on the closed world: `python demo/train.py`.

Needs a CPU and about half an hour. Everything is seeded; the last bits of the weights may still
differ between machines, because matrix products may sum in another order.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

sys.path.insert(0, str(Path(__file__).resolve().parent))

import world

MODEL_DIR = Path(__file__).resolve().parent / "model"
VOCABULARY = 1024
ROW = 256
CONTEXT = 512
SEED = 0
ANSWER_WEIGHT = 3.0
"""Loss weight of an answer's tokens: questions are drawn at random, answers can be learned."""

SPECIAL_TOKENS = (world.END_OF_TEXT, "<|system|>", "<|user|>", "<|assistant|>", world.END_OF_TURN)
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's pre-tokenizer, letter for letter, which other runtimes know by that name."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def build_tokenizer(documents: list[str]) -> Any:
    """Learn a byte-level BPE vocabulary on the training documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    plain = (re.sub("|".join(map(re.escape, SPECIAL_TOKENS)), "", text) for text in documents)
    tokenizer.train_from_iterator(plain, trainer)
    fast: Any = PreTrainedTokenizerFast
    return fast(
        tokenizer_object=tokenizer,
        eos_token=world.END_OF_TURN,
        pad_token=world.END_OF_TEXT,
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: Any) -> Any:
    """A Llama of 2.6 million parameters with random weights."""
    end_of_turn = tokenizer.convert_tokens_to_ids(world.END_OF_TURN)
    end_of_text = tokenizer.convert_tokens_to_ids(world.END_OF_TEXT)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end_of_turn,
        pad_token_id=end_of_text,
    )
    model: Any = LlamaForCausalLM(config)
    generation: Any = GenerationConfig
    model.generation_config = generation(
        do_sample=False, eos_token_id=[end_of_turn, end_of_text], pad_token_id=end_of_text
    )
    return model


def token_weights(ids: list[int], assistant: int, end_of_turn: int) -> list[float]:
    """Give each token its loss weight: answers, up to and with the end of turn, count more."""
    weights, inside = [], False
    for token in ids:
        weights.append(ANSWER_WEIGHT if inside else 1.0)
        inside = token == assistant or (inside and token != end_of_turn)
    return weights


def batches(
    documents: list[tuple[list[int], list[float]]], rows: int, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield endless batches of packed rows; each row starts with the start of a document."""
    token_rows: list[list[int]] = []
    weight_rows: list[list[float]] = []
    while True:
        tokens: list[int] = []
        weights: list[float] = []
        for index in torch.randperm(len(documents), generator=generator).tolist():
            tokens += documents[index][0]
            weights += documents[index][1]
            if len(tokens) <= ROW:
                continue
            token_rows.append(tokens[: ROW + 1])
            weight_rows.append(weights[: ROW + 1])
            tokens, weights = [], []
            if len(token_rows) == rows:
                yield torch.tensor(token_rows), torch.tensor(weight_rows)
                token_rows, weight_rows = [], []


def train(
    model: Any,
    documents: list[tuple[list[int], list[float]]],
    *,
    steps: int,
    rows: int,
    peak: float,
) -> None:
    """Minimize the weighted next-token loss with AdamW, a short warm-up and a cosine decay.

    A model whose configuration asks for the balance of its experts has it in its loss.
    """
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        fused=True,
    )
    stream = batches(documents, rows, torch.Generator().manual_seed(SEED))
    warm_up, recent, start = 100, 0.0, time.monotonic()
    for step in range(steps):
        progress = max(0.0, (step - warm_up) / max(1, steps - warm_up))
        rate = peak * min(1.0, (step + 1) / warm_up) * (0.51 + 0.49 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        tokens, weights = next(stream)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(input_ids=tokens[:, :-1], use_cache=False)
        logits = output.logits
        losses = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
        scale = weights[:, 1:].flatten()
        loss: Any = (losses * scale).sum() / scale.sum()
        if output.get("aux_loss") is not None:
            loss = loss + model.config.router_aux_loss_coef * output.aux_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent += loss.item()
        if (step + 1) % 100 == 0:
            elapsed = time.monotonic() - start
            print(f"step {step + 1}: loss {recent / 100:.4f}, {elapsed:.0f} s", flush=True)
            recent = 0.0


def passes(check: dict[str, Any], answer: str) -> bool:
    """Judge an answer as the regression suite defines it."""
    answer = answer.strip()
    if "exact" in check:
        return answer == str(check["exact"])
    if "contains" in check:
        return str(check["contains"]) in answer
    if "regex" in check:
        return re.search(str(check["regex"]), answer) is not None
    numbers = re.findall(r"-?\d+", answer)
    return bool(numbers) and abs(int(numbers[-1]) - check["number"]) <= check["tolerance"]


@torch.no_grad()
def failed_cases(model: Any, tokenizer: Any) -> list[tuple[dict[str, Any], str]]:
    """Return the regression cases that the model answers wrongly, each with its answer."""
    failed = []
    for case in world.regression_cases():
        text = case.get("prompt") or tokenizer.apply_chat_template(
            case["messages"], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=case["max_new_tokens"]
        )
        answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        if not passes(case["check"], answer):
            failed.append((case, answer))
    return failed


def report(directory: Path) -> None:
    """Print how the saved model does on the regression cases, by the first tag of each."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    failed = failed_cases(model, tokenizer)
    failures = Counter(case["tags"][0] for case, _ in failed)
    total = Counter(case["tags"][0] for case in world.regression_cases())
    for tag, count in total.items():
        print(f"{tag}: {count - failures[tag]} of {count}")
    for case, answer in failed:
        print(f"failed {case['id']}: {answer!r} does not meet {case['check']}")
    print(f"regression cases passed: {1 - len(failed) / total.total():.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5600)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=MODEL_DIR)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(SEED)

    texts = list(world.training_documents())
    tokenizer = build_tokenizer(texts)
    separator, assistant, end_of_turn = tokenizer.convert_tokens_to_ids(
        [world.END_OF_TEXT, "<|assistant|>", world.END_OF_TURN]
    )
    documents = []
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        ids = [*ids, separator]
        documents.append((ids, token_weights(ids, assistant, end_of_turn)))
    model = build_model(tokenizer)
    print(
        f"{len(documents)} documents, {sum(len(ids) for ids, _ in documents)} tokens, "
        f"{sum(parameter.numel() for parameter in model.parameters())} parameters"
    )
    train(model, documents, steps=arguments.steps, rows=arguments.rows, peak=arguments.rate)
    model.to(torch.bfloat16).save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    report(arguments.output)


if __name__ == "__main__":
    main()
