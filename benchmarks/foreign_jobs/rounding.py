"""AutoRound in its own format, packed as GPTQ (both versions of its zero points) and as AWQ.

What is packed as GPTQ is loaded by transformers with it; for AWQ it has nothing that runs on CPU.
"""

import torch
from auto_round import AutoRound
from told import Job, parse
from transformers import AutoModelForCausalLM, AutoTokenizer
from weights import save

# The format, and whether it is symmetric.
VARIANTS = {
    "auto_gptq": ("auto_round:auto_gptq", True),
    "gptqmodel": ("auto_round:gptqmodel", False),
    "auto_awq": ("auto_round:auto_awq", False),
}


def run(job: Job) -> None:
    layout, symmetric = VARIANTS[job.variant]
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job.model),
        bits=4,
        group_size=64,
        sym=symmetric,
        iters=20,
        nsamples=len(job.rows),
        seqlen=len(job.rows[0]),
        dataset=list(torch.tensor(job.rows).split(8)),
        device_map="cpu",
    )
    made = job.artifact.parent / "made"
    rounding.quantize_and_save(str(made), format=layout)
    [config] = made.rglob("config.json")  # in a folder that it names itself
    config.parent.rename(job.artifact)
    if job.variant == "auto_awq":
        return
    loaded = AutoModelForCausalLM.from_pretrained(job.artifact, dtype=torch.bfloat16)
    save(loaded, job.model, job.weights, torch.bfloat16)


if __name__ == "__main__":
    run(parse())
