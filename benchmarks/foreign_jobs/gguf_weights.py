"""A GGUF file as transformers loads it: gguf-py's decoders, its own names and permutations."""

import torch
from arguments import Job, parse
from transformers import AutoModelForCausalLM
from weights import save


def run(job: Job) -> None:
    [file] = job.artifact.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        job.artifact, gguf_file=file.name, dtype=torch.float32
    )
    save(model, job.model, job.weights, torch.float32)


if __name__ == "__main__":
    run(parse())
