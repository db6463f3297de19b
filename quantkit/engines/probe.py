"""What an engine costs: in a fresh process it loads an artifact, warms up and is timed."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantkit.base.errors import InputError
from quantkit.base.files import openable
from quantkit.engines import worker
from quantkit.results.cost import Cost

_BATCH = 8


@dataclass(frozen=True)
class Probe:
    """What to measure: path of a directory or a GGUF file, the engine, and the load."""

    path: str
    engine: str
    device: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    repeats: int

    def prompt(self) -> list[int]:
        """Token ids that every vocabulary has; all take a dense model equally long."""
        return [1 + i % 30 for i in range(self.prompt_tokens)]

    def cost(self, **figures: Any) -> Cost:
        """The figures beside what they were measured with."""
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


def run_probe(probe: Probe, name: str) -> Cost:
    """Measure in a process of its own; ``name``: the artifact's, for errors.

    An engine that isn't installed, or refuses the artifact, leaves all figures empty, with the
    reason.
    Raises MachineError when the process dies.
    """
    # OpenMP reads this when it is loaded, which is before torch.set_num_threads can be called.
    environment = {"OMP_NUM_THREADS": str(probe.threads)}
    where = f"{name} ({probe.engine})"
    try:
        return Cost(**worker.ask(__name__, asdict(probe), where, environment))
    except InputError as error:
        return probe.cost(missing={"all figures": error.what})


def _resident_bytes() -> int:
    """Memory of this process that is in RAM now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _peak_bytes() -> int:
    """The most memory that this process ever had in RAM."""
    # On Linux getrusage includes the parent's memory at the moment of the fork; VmHWM is of the
    # running program alone.
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


def _measure_llamacpp(probe: Probe) -> Cost:
    """llama.cpp on a GGUF file; rates are the server's own timings."""
    from quantkit.engines.llamacpp import LlamaCpp

    path = Path(probe.path)
    prompt = probe.prompt()
    context = probe.prompt_tokens + probe.new_tokens + 8
    with LlamaCpp(path, threads=probe.threads, context=context, parallel=_BATCH) as engine:
        resident = _resident_bytes()
        engine.measure([prompt], probe.new_tokens)
        single = [engine.measure([prompt], probe.new_tokens) for _ in range(probe.repeats)]
        many = [engine.measure([prompt] * _BATCH, probe.new_tokens) for _ in range(probe.repeats)]
        decode = statistics.median(timing.decode_rate for timing in single)
        return probe.cost(
            weights_bytes=path.stat().st_size,
            resident_bytes=resident,
            peak_bytes=_peak_bytes(),
            prefill_tokens_per_second=statistics.median(t.prefill_rate for t in single),
            decode_tokens_per_second=decode,
            decode_tokens_per_second_batch8=statistics.median(t.decode_rate for t in many),
            ttft_ms=1000 * statistics.median(t.first_token_seconds for t in single),
            tpot_ms=1000 / decode,
        )


def _measure_torch(probe: Probe) -> Cost:
    """A transformers model, or ours with packed linears, by a greedy loop with a cache."""
    import torch

    torch.set_num_threads(probe.threads)
    if probe.engine == "quantkit-int4":
        from quantkit.checkpoint.reader import Checkpoint
        from quantkit.engines import int4
        from quantkit.formats.packed import PackedCheckpoint

        source = PackedCheckpoint(Checkpoint(Path(probe.path)))
        model, name = int4.load(source, torch.device(probe.device))
    else:
        from quantkit.engines.choose import check_engine
        from quantkit.model.build import class_of

        check_engine(probe.engine, Path(probe.path))
        name = probe.engine
        device_map = None if probe.device == "cpu" else probe.device
        path = openable(Path(probe.path))
        kind: Any = class_of(path)
        model = kind.from_pretrained(path, dtype="auto", device_map=device_map)
        model.eval()
    from quantkit.model.limits import fixed_positions

    positions, tokens = fixed_positions(model), probe.prompt_tokens + probe.new_tokens - 1
    if positions is not None and tokens > positions:
        raise InputError(
            f"{probe.prompt_tokens} tokens and {probe.new_tokens} new ones don't fit in the "
            f"model's {positions} positions"
        )
    resident = _resident_bytes()
    row = torch.tensor(probe.prompt(), device=model.device)

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
        for _ in range(probe.new_tokens - 1):
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
        synchronize()
        return first - begun, time.perf_counter() - first

    def medians(batch: int) -> tuple[float, float]:
        run(batch)  # warm-up
        runs = [run(batch) for _ in range(probe.repeats)]
        return statistics.median(r[0] for r in runs), statistics.median(r[1] for r in runs)

    prefill, decode = medians(1)
    _, decode8 = medians(_BATCH)
    steps = probe.new_tokens - 1
    weights = _held_bytes(model)
    on_gpu = _measure_gpu(model, row, probe) if model.device.type == "cuda" else {}
    return probe.cost(
        engine=name,
        weights_bytes=weights,
        resident_bytes=resident,
        peak_bytes=_peak_bytes(),
        prefill_tokens_per_second=probe.prompt_tokens / prefill,
        decode_tokens_per_second=steps / decode,
        decode_tokens_per_second_batch8=_BATCH * steps / decode8,
        ttft_ms=1000 * prefill,
        tpot_ms=1000 * decode / steps,
        **on_gpu,
    )


def _measure_gpu(model: Any, row: Any, probe: Probe) -> dict[str, Any]:
    """The figures of a GPU alone: its memory at its peak so far, and decoding by CUDA graphs."""
    import torch

    from quantkit.engines import graphs

    figures: dict[str, Any] = {"device_peak_bytes": torch.cuda.max_memory_allocated(model.device)}
    missing = {}
    names = "decode_tokens_per_second_graphs", "decode_tokens_per_second_batch8_graphs"
    for name, batch in zip(names, (1, _BATCH), strict=True):
        ids = row.expand(batch, -1).contiguous()
        try:
            with torch.cuda.device(model.device):
                seconds = graphs.decode_seconds(model, ids, probe.new_tokens, probe.repeats)
        except Exception as error:  # whatever a model's own code does that a graph can't hold
            reason = str(error).strip().splitlines() or [type(error).__name__]
            missing[name] = f"no CUDA graph of it could be replayed: {reason[0]}"
        else:
            figures[name] = batch * (probe.new_tokens - 1) / seconds
    return {**figures, "missing": missing}


def _held_bytes(model: Any) -> int:
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


_ENGINES: dict[str, Callable[[Probe], Cost]] = {
    "llama.cpp": _measure_llamacpp,
    "quantkit-int4": _measure_torch,
    "transformers": _measure_torch,
}


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    probe = Probe(**job)
    return asdict(_ENGINES[probe.engine](probe))


if __name__ == "__main__":
    worker.serve(_answer)
