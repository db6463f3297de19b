"""llm-compressor: oneshot with its own defaults, in groups of 128."""

from typing import Any

from arguments import Arguments, parse
from datasets import Dataset
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, AutoTokenizer


def modifier(given: Arguments) -> Any:
    """GPTQ or AWQ on all linears but the head."""
    weights = {
        "num_bits": given.bits,
        "type": "int",
        "symmetric": given.symmetric,
        "strategy": "group",
        "group_size": 128,
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    if given.job == "gptq":
        from llmcompressor.modifiers.quantization import GPTQModifier

        return GPTQModifier(config_groups=groups, ignore=["lm_head"])
    from llmcompressor.modifiers.awq import AWQModifier

    return AWQModifier(config_groups=groups, ignore=["lm_head"])


def quantize(given: Arguments) -> None:
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype="bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    rows = {"input_ids": given.rows, "attention_mask": [[1] * len(row) for row in given.rows]}
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=Dataset.from_dict(rows),
        recipe=[modifier(given)],
        max_seq_length=len(given.rows[0]),
        num_calibration_samples=len(given.rows),
        output_dir=str(given.out),
    )


if __name__ == "__main__":
    quantize(parse())
