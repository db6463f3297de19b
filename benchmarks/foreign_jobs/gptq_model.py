"""GPTQModel: GPTQ in both versions of the format, with and without permuted groups.

Its pool of CPU threads has half as many workers as there are cores, and its loader asks for two:
with fewer than three cores it raises at import. Its own variable GPTQMODEL_CPU_WORKERS fixes that.
"""

import os
from typing import Any

if (os.cpu_count() or 1) < 3:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from arguments import Job, parse
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from weights import save

VARIANTS: dict[str, dict[str, Any]] = {
    "v1-sym": {"bits": 4, "group_size": 128, "sym": True, "format": "gptq"},
    "v1-asym": {"bits": 4, "group_size": 64, "sym": False, "format": "gptq"},
    "v2-asym": {"bits": 4, "group_size": 64, "sym": False, "format": "gptq_v2"},
    "act-order": {"bits": 4, "group_size": 64, "desc_act": True, "act_group_aware": False},
    "dynamic": {
        "bits": 4,
        "group_size": 128,
        "dynamic": {r"+:.*\.down_proj": {"bits": 8, "group_size": 64}, r"-:.*\.o_proj": {}},
    },
    "3bit": {"bits": 3, "group_size": 128, "sym": True, "format": "gptq"},
}


def run(job: Job) -> None:
    model = GPTQModel.load(str(job.model), QuantizeConfig(**VARIANTS[job.variant]), device="cpu")
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in job.rows]
    model.quantize(rows, batch_size=1)
    model.save(str(job.artifact))
    loaded = GPTQModel.load(
        str(job.artifact), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16
    )
    save(loaded.model, job.model, job.weights, torch.float16)


if __name__ == "__main__":
    run(parse())
