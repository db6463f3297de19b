"""transformers, with the package that loads an artifact's format there."""

from pathlib import Path

import exchange
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel


def load(job: exchange.Job) -> PreTrainedModel:
    path = Path(job.path)
    place = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    directory = path.parent if place else path
    dtype = getattr(torch, job.dtype)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **place)
    return model


@torch.inference_mode()
def main() -> None:
    job = exchange.receive()
    model = load(job)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=job.new_tokens,
        eos_token_id=job.end or None,
        pad_token_id=0,
    )
    tokens = []
    for prompt in job.prompts:
        ids = torch.tensor([prompt])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        tokens.append(whole[0, len(prompt) :].tolist())
    logits = model(torch.tensor(job.rows)).logits[:, :-1].float()
    exchange.give(exchange.Answer(tokens, logits.log_softmax(-1).tolist()))


if __name__ == "__main__":
    main()
