"""One engine in one fresh process: load, warm up, time, and print the figures as JSON.

Run by ``measure.py`` as ``python -m quantkit.engines.probe SPEC``; nothing of the parent's memory
or caches is in the figures.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.base.errors import QuantkitError
from quantkit.results.cost import Cost

_BATCH = 8


@dataclass(frozen=True)
class Spec:
    """What to measure: path of a directory or a GGUF file, the engine, and the load."""

    path: str
    engine: str
    device: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    repeats: int

    def prompt(self) -> list[int]:
        """Token ids that every vocabulary has; a dense model takes as long for one as another."""
        return [1 + i % 30 for i in range(self.prompt_tokens)]

    def cost(self, **figures: Any) -> Cost:
        return Cost(
            **{
                "engine": self.engine,
                "device": self.device,
                "threads": self.threads,
                "prompt_tokens": self.prompt_tokens,
                "new_tokens": self.new_tokens,
                "repeats": self.repeats,
                **figures,
            }
        )


def resident_bytes() -> int:
    """Memory of this process that is in RAM now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_bytes() -> int:
    """The most memory that this process ever had in RAM.

    Linux says so of the running program alone; what getrusage says there includes the parent's
    memory at the moment of the fork.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def measure_llamacpp(spec: Spec) -> Cost:
    """llama.cpp on a GGUF file; rates are the server's own timings."""
    from quantkit.engines.llamacpp import LlamaCpp

    path = Path(spec.path)
    prompt = spec.prompt()
    context = spec.prompt_tokens + spec.new_tokens + 8
    with LlamaCpp(path, threads=spec.threads, context=context, parallel=_BATCH) as engine:
        resident = resident_bytes()
        engine.measure([prompt], spec.new_tokens)
        single = [engine.measure([prompt], spec.new_tokens) for _ in range(spec.repeats)]
        many = [engine.measure([prompt] * _BATCH, spec.new_tokens) for _ in range(spec.repeats)]
        decode = statistics.median(timing.decode_rate for timing in single)
        return spec.cost(
            weights_bytes=path.stat().st_size,
            resident_bytes=resident,
            peak_bytes=peak_bytes(),
            prefill_tokens_per_second=statistics.median(t.prefill_rate for t in single),
            decode_tokens_per_second=decode,
            decode_tokens_per_second_batch8=statistics.median(t.decode_rate for t in many),
            ttft_ms=1000 * statistics.median(t.first_token_seconds for t in single),
            tpot_ms=1000 / decode,
        )


def measure_torch(spec: Spec) -> Cost:
    """A transformers model, or ours with packed linears, by a greedy loop with a cache."""
    import torch

    torch.set_num_threads(spec.threads)
    if spec.engine == "quantkit-int4":
        from quantkit.checkpoint.reader import Checkpoint
        from quantkit.engines import int4
        from quantkit.formats.packed import PackedCheckpoint

        model, name = int4.load(PackedCheckpoint(Checkpoint(Path(spec.path))))
    else:
        from transformers import AutoModelForCausalLM

        from quantkit.engines.choose import check_engine

        check_engine(spec.engine, Path(spec.path))
        name = spec.engine
        model = AutoModelForCausalLM.from_pretrained(
            spec.path, dtype="auto", device_map=None if spec.device == "cpu" else spec.device
        )
        model.eval()
    resident = resident_bytes()
    row = torch.tensor(spec.prompt(), device=model.device)

    @torch.inference_mode()
    def run(batch: int) -> tuple[float, float]:
        """Seconds for the prompt and for the tokens after the first."""
        ids = row.expand(batch, -1)
        synchronize = torch.cuda.synchronize if model.device.type == "cuda" else (lambda: None)
        synchronize()
        begun = time.perf_counter()
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
        synchronize()
        first = time.perf_counter()
        for _ in range(spec.new_tokens - 1):
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
        synchronize()
        return first - begun, time.perf_counter() - first

    def medians(batch: int) -> tuple[float, float]:
        run(batch)  # warm-up
        runs = [run(batch) for _ in range(spec.repeats)]
        return statistics.median(r[0] for r in runs), statistics.median(r[1] for r in runs)

    prefill, decode = medians(1)
    _, decode8 = medians(_BATCH)
    steps = spec.new_tokens - 1
    return spec.cost(
        engine=name,
        weights_bytes=held_bytes(model),
        resident_bytes=resident,
        peak_bytes=peak_bytes(),
        prefill_tokens_per_second=spec.prompt_tokens / prefill,
        decode_tokens_per_second=steps / decode,
        decode_tokens_per_second_batch8=_BATCH * steps / decode8,
        ttft_ms=1000 * prefill,
        tpot_ms=1000 * decode / steps,
    )


def held_bytes(model: Any) -> int:
    """Bytes of parameters and buffers as they are held, bitsandbytes' statistics included."""
    import torch

    seen: dict[int, int] = {}

    def count(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            seen[value.data_ptr()] = max(seen.get(value.data_ptr(), 0), value.nbytes)

    for tensor in [*model.parameters(), *model.buffers()]:
        count(tensor)
        state = getattr(tensor, "quant_state", None)
        while state is not None:
            for value in vars(state).values():
                count(value)
            state = getattr(state, "state2", None)
    return sum(seen.values())


_ENGINES: dict[str, Callable[[Spec], Cost]] = {
    "llama.cpp": measure_llamacpp,
    "quantkit-int4": measure_torch,
    "transformers": measure_torch,
}


def main() -> None:
    """Measure what the first argument says; the last line of stdout is the result."""
    # Whatever a library prints goes to stderr, so that stdout holds the result alone.
    result = os.dup(1)
    os.dup2(2, 1)
    spec = Spec(**json.loads(sys.argv[1]))
    try:
        answer: dict[str, Any] = {"cost": dataclasses.asdict(_ENGINES[spec.engine](spec))}
    except QuantkitError as error:
        answer = {"error": str(error)}
    with os.fdopen(result, "w") as stdout:
        stdout.write(json.dumps(answer))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
