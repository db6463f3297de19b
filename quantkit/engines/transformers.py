"""transformers as the engine, on weights that are whole in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psutil
import torch

from quantkit.base.errors import MachineError

_BATCH = 16


def check_memory(parameters: int, dtype: torch.dtype, purpose: str, device: torch.device) -> None:
    """Raise MachineError when a model of that many ``parameters`` won't fit into free memory.

    ``purpose``: what needs the model, for the message; ``device``: the one that holds it.
    """
    needed = parameters * dtype.itemsize
    cuda = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if cuda else psutil.virtual_memory().available
    if needed > free:
        where = f"the memory of {device}" if cuda else "memory"
        larger = "--device cpu, a GPU" if cuda else "a machine"
        raise MachineError(
            f"{purpose} needs the whole model in {where}: {needed / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free",
            fix=f"Use {larger} with more memory, or a suite without regression cases.",
        )


@torch.inference_mode()
def generate(
    model: Any, prompts: Sequence[list[int]], limits: Sequence[int], end: Sequence[int]
) -> list[list[int]]:
    """Greedy continuations without the prompt and without what follows an end token.

    Prompts of equal length share a batch, so that nothing is ever padded.
    """
    from transformers import GenerationConfig

    by_shape: dict[tuple[int, int], list[int]] = {}
    for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        by_shape.setdefault((len(prompt), limit), []).append(index)
    results: list[list[int]] = [[] for _ in prompts]
    for (length, limit), indices in sorted(by_shape.items()):
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=limit,
            eos_token_id=list(end) or None,
            pad_token_id=0,  # what an answer that has ended is filled up with; any id would do
            # Or a config's own output_attentions would change what is returned.
            return_dict_in_generate=False,
            output_attentions=False,
            output_hidden_states=False,
        )
        for start in range(0, len(indices), _BATCH):
            chosen = indices[start : start + _BATCH]
            ids = torch.tensor([prompts[i] for i in chosen], device=model.device)
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=config
            )
            for i, row in zip(chosen, made[:, length:].tolist(), strict=True):
                stop = next((n for n, token in enumerate(row) if token in end), len(row))
                results[i] = row[:stop]
    return results


@torch.inference_mode()
def score(model: Any, sequences: Sequence[list[int]], ends: Sequence[int]) -> list[float]:
    """Log-likelihoods, in nats, of the last ``ends`` tokens of sequences, given what is before.

    Sequences of equal length share a batch, so that nothing is ever padded.
    """
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(sequences):
        by_length.setdefault(len(ids), []).append(index)
    results = [0.0] * len(sequences)
    for _, indices in sorted(by_length.items()):
        for start in range(0, len(indices), _BATCH):
            chosen = indices[start : start + _BATCH]
            batch = torch.tensor([sequences[i] for i in chosen], device=model.device)
            logits = model(input_ids=batch, use_cache=False).logits
            sums = []  # read together: reading one makes a GPU wait
            for row, index in enumerate(chosen):
                end = ends[index]
                predicted = logits[row, -end - 1 : -1].float().log_softmax(-1)
                seen = predicted.gather(-1, batch[row, -end:, None])
                sums.append(seen.sum(dtype=torch.float64))
            for index, value in zip(chosen, torch.stack(sums).tolist(), strict=True):
                results[index] = value
    return results
