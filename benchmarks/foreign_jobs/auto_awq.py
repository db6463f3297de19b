"""AutoAWQ: 4 bits, asymmetric, packed as GEMM."""

import torch
from awq import AutoAWQForCausalLM
from awq.modules.linear import gemm
from told import Job, parse
from transformers import AutoTokenizer
from weights import save


def run(job: Job) -> None:
    group = int(job.variant.removeprefix("g"))
    model = AutoAWQForCausalLM.from_pretrained(str(job.model), device_map="cpu")
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    model.quantize(
        tokenizer,
        quant_config={"zero_point": True, "q_group_size": group, "w_bit": 4, "version": "GEMM"},
        calib_data=job.rows,
        max_calib_samples=len(job.rows),
        max_calib_seq_len=len(job.rows[0]),
    )
    model.save_quantized(str(job.artifact))
    tokenizer.save_pretrained(job.artifact)
    gemm.TRITON_AVAILABLE = False  # imports on a CPU too, but doesn't run there
    loaded = AutoAWQForCausalLM.from_quantized(
        str(job.artifact), device_map="cpu", fuse_layers=False, torch_dtype=torch.float16
    )
    save(loaded.model, job.model, job.weights, torch.float16)


if __name__ == "__main__":
    run(parse())
