"""transformers with bitsandbytes: NF4, FP4 and LLM.int8 by save_pretrained."""

from typing import Any

import torch
from arguments import Job, parse
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from weights import save

VARIANTS: dict[str, dict[str, Any]] = {
    "nf4-double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


def run(job: Job) -> None:
    settings = VARIANTS[job.variant]
    if "load_in_4bit" in settings:
        settings["bnb_4bit_compute_dtype"] = torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(
        job.model, quantization_config=BitsAndBytesConfig(**settings), dtype=torch.bfloat16
    )
    model.save_pretrained(job.artifact)
    AutoTokenizer.from_pretrained(job.model).save_pretrained(job.artifact)
    loaded = AutoModelForCausalLM.from_pretrained(job.artifact, dtype=torch.float32)
    for module in loaded.modules():
        if hasattr(module, "compute_dtype"):
            # Otherwise weights and outputs would be rounded to bfloat16.
            module.compute_dtype = torch.float32
            module.support_avx512bf16_for_cpu = False
    save(loaded, job.model, job.weights, torch.float32)


if __name__ == "__main__":
    run(parse())
