"""AutoAWQ: 4 bits, asymmetric, packed as GEMM."""

import torch
from arguments import Job, parse
from awq import AutoAWQForCausalLM
from awq.modules.linear import gemm
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
    # Loading the artifact needs a GPU or Intel's extension, but this model's linears are packed
    # already.
    gemm.TRITON_AVAILABLE = False  # Triton imports on a CPU too, but doesn't run there
    save(model.model, job.model, job.weights, torch.float16)


if __name__ == "__main__":
    run(parse())
