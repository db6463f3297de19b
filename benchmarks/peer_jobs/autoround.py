"""AutoRound with its own defaults, 200 iterations among them, in groups of 128."""

import torch
from arguments import Arguments, parse
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer


def quantize(given: Arguments) -> None:
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    rounding = AutoRound(
        model,
        tokenizer,
        bits=given.bits,
        group_size=128,
        sym=given.symmetric,
        iters=200,
        nsamples=len(given.rows),
        seqlen=len(given.rows[0]),
        dataset=list(torch.tensor(given.rows).split(8)),
        device_map=given.device,
    )
    rounding.quantize_and_save(str(given.out), format="auto_gptq")


if __name__ == "__main__":
    quantize(parse())
