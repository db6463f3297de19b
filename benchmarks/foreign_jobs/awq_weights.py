"""AutoAWQ's own decoder on an artifact that another tool packed as AWQ.

The linears are put together here, because AutoAWQ's loader needs a GPU.
"""

import torch
from arguments import Job, parse
from awq.modules.linear import gemm
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from weights import save


def run(job: Job) -> None:
    gemm.TRITON_AVAILABLE = False  # Triton imports on a CPU too, but doesn't run there
    tensors = load_file(job.artifact / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(job.model, torch_dtype=torch.float32)
    for key in [key for key in tensors if key.endswith(".qweight")]:
        name = key.removesuffix(".qweight")
        path, _, leaf = name.rpartition(".")
        original = model.get_submodule(name)
        group = original.in_features // tensors[f"{name}.scales"].shape[0]
        linear = gemm.WQLinear_GEMM.from_linear(original, 4, group, init_only=True)
        for part in ("qweight", "qzeros", "scales"):
            setattr(linear, part, tensors[f"{name}.{part}"])
        setattr(model.get_submodule(path), leaf, linear)
    rest = {key: value.float() for key, value in tensors.items() if value.is_floating_point()}
    model.load_state_dict({k: v for k, v in rest.items() if not k.endswith("scales")}, strict=False)
    save(model, job.model, job.weights, torch.float16)


if __name__ == "__main__":
    run(parse())
