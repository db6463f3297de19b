"""llm-compressor: oneshot with its own defaults, in groups of 128."""

from typing import Any

from arguments import Arguments, parse
from datasets import Dataset
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, AutoTokenizer


def modifier(given: Arguments, config: Any) -> Any:
    """GPTQ or AWQ on all linears but the head, and the routers of a mixture of experts."""
    weights = {
        "num_bits": given.bits,
        "type": "int",
        "symmetric": given.symmetric,
        "strategy": "group",
        "group_size": 128,
    }
    ignore = ["lm_head"]
    if hasattr(config, "num_experts"):
        ignore.append("re:.*mlp.gate$")
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    if given.job == "gptq":
        from llmcompressor.modifiers.quantization import GPTQModifier

        return GPTQModifier(config_groups=groups, ignore=ignore)
    from llmcompressor.modifiers.awq import AWQModifier

    return AWQModifier(config_groups=groups, ignore=ignore)


def quantize(given: Arguments) -> None:
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype="bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    rows = {"input_ids": given.rows, "attention_mask": [[1] * len(row) for row in given.rows]}
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=Dataset.from_dict(rows),
        recipe=[modifier(given, model.config)],
        max_seq_length=len(given.rows[0]),
        num_calibration_samples=len(given.rows),
        output_dir=str(given.out),
    )


if __name__ == "__main__":
    quantize(parse())
