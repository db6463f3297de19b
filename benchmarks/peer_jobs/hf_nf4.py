"""transformers with bitsandbytes: NF4 with double quantization, as the documentation shows it."""

import torch
from arguments import parse
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def main() -> None:
    given = parse()
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        given.model,
        quantization_config=config,
        dtype=torch.bfloat16,
        device_map=given.device,
    )
    model.save_pretrained(given.out)
    AutoTokenizer.from_pretrained(given.model).save_pretrained(given.out)


if __name__ == "__main__":
    main()
