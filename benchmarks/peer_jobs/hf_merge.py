"""PEFT: merge a LoRA adapter and save the result."""

import torch
from arguments import parse
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    given = parse()
    model = AutoModelForCausalLM.from_pretrained(
        given.model, dtype=torch.bfloat16, device_map=given.device
    )
    merged = PeftModel.from_pretrained(model, given.adapter).merge_and_unload()
    merged.save_pretrained(given.out, max_shard_size="2GB")
    AutoTokenizer.from_pretrained(given.model).save_pretrained(given.out)


if __name__ == "__main__":
    main()
