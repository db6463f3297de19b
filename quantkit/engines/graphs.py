"""Decoding as a CUDA graph: all kernels of a step are launched at once, by replaying them.

A step of a small model is over before Python has launched the next kernel. Engines that people
serve with replay graphs, so figures without them say little about a GPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_WARM_UPS = 3
_DIFFERENCE = 0.02  # of the logits, relative: bfloat16's rounding in another order

Step = Callable[[], None]


class NoGraph(Exception):
    """A model's step can't be replayed; the message is the reason."""


def captured(begin: Step, step: Step) -> Step:
    """``step``, recorded on the current CUDA device, as a function that replays it.

    It is run a few times before, each time after ``begin``, so that whatever it makes only once
    isn't part of the graph.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(_WARM_UPS):
            begin()
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    replay: Step = graph.replay
    return replay


@torch.inference_mode()
def decode_seconds(
    model: Any,
    ids: Tensor,
    new_tokens: int,
    repeats: int,
    capture: Callable[[Step, Step], Step] = captured,
) -> float:
    """Seconds for the tokens after the first one, of ``new_tokens``: the median of ``repeats``.

    ids: the prompts, (batch, tokens). Raises NoGraph for a model whose step can't be replayed, and
    where a replay doesn't compute what the step does; an error of the model's own code may come
    through too.
    """
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    length = ids.shape[1]
    cache = StaticCache(config=model.config, max_cache_len=length + new_tokens)
    if any(type(layer) is not StaticLayer for layer in cache.layers):
        # They decide in Python by how many tokens they have seen, which a graph can't.
        raise NoGraph("layers with caches other than one of all tokens aren't replayed")
    token = torch.empty((ids.shape[0], 1), dtype=torch.int64, device=ids.device)
    seen: list[Tensor] = []  # the logits of the last step that Python ran

    def begin() -> None:
        cache.reset()
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token.copy_(output.logits[:, -1:].argmax(-1))

    def step() -> None:
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        seen[:] = [output.logits]
        token.copy_(output.logits[:, -1:].argmax(-1))

    synchronize = torch.cuda.synchronize if ids.device.type == "cuda" else (lambda: None)
    begin()
    step()
    expected = seen[0].float()
    replay = capture(begin, step)  # the logits in ``seen`` are now those that a replay writes
    begin()
    replay()
    if not (seen[0].float() - expected).norm() <= _DIFFERENCE * expected.norm():
        raise NoGraph("a replayed step gives other logits than the step itself")

    def run() -> float:
        begin()
        synchronize()
        begun = time.perf_counter()
        for _ in range(new_tokens - 1):
            replay()
        synchronize()
        return time.perf_counter() - begun

    run()  # warm-up
    seconds = statistics.median(run() for _ in range(repeats))
    if (passed := int(cache.get_seq_length())) != length + new_tokens - 1:
        raise NoGraph(f"{passed} tokens are in the cache instead of {length + new_tokens - 1}")
    return seconds
