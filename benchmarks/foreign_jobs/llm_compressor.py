"""llm-compressor; transformers with compressed-tensors loads its artifacts."""

import torch
from arguments import Job, parse
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer
from weights import figures, save

MODIFIERS = {
    "W4A16": GPTQModifier,
    "W4A16_ASYM": QuantizationModifier,
    "W8A16": QuantizationModifier,
    "W8A8": GPTQModifier,
    "FP8_DYNAMIC": QuantizationModifier,
    "FP8": QuantizationModifier,
}
INPUTS_TOO = ("W8A8", "FP8", "FP8_DYNAMIC")


def run(job: Job) -> None:
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype="bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    rows = {"input_ids": job.rows, "attention_mask": [[1] * len(row) for row in job.rows]}
    modifier = MODIFIERS[job.variant]
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=Dataset.from_dict(rows),
        recipe=[modifier(targets="Linear", scheme=job.variant, ignore=["lm_head"])],
        max_seq_length=len(job.rows[0]),
        num_calibration_samples=len(job.rows),
        output_dir=str(job.artifact),
    )
    original, loaded = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (job.model, job.artifact)
    )
    loaded(torch.tensor(job.rows[:1]))  # the first forward unpacks the weights
    if job.variant in INPUTS_TOO:
        figures(loaded, original, job.heldout, job.figures)
    else:
        save(loaded, job.model, job.weights, torch.float32)


if __name__ == "__main__":
    run(parse())
