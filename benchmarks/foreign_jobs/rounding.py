"""AutoRound in its own format, packed as GPTQ (both versions of its zero points) and as AWQ.

Artifacts packed as GPTQ are loaded by transformers with AutoRound; for AWQ AutoRound has no kernel
that runs on a CPU, so that awq_weights.py reads them.
"""

import torch
from arguments import Job, parse
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer
from weights import save

# The format, and whether the grid is symmetric.
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
    [config] = made.rglob("config.json")  # AutoRound names the folder
    config.parent.rename(job.artifact)
    if job.variant == "auto_awq":
        return
    loaded = AutoModelForCausalLM.from_pretrained(job.artifact, dtype=torch.bfloat16)
    save(loaded, job.model, job.weights, torch.bfloat16)


if __name__ == "__main__":
    run(parse())
