"""What running a model takes: memory, latency and throughput."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Load:
    """What every engine is asked to do when its cost is measured.

    One prompt of ``prompt_tokens`` is read and ``new_tokens`` are generated, ``repeats`` times;
    the median counts. threads: of the CPU, all cores if None; device: of the engines transformers
    and quantkit-int4, llama.cpp runs on the CPU.
    """

    prompt_tokens: int = 128
    new_tokens: int = 32
    repeats: int = 3
    threads: int | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Cost:
    """The cost of one model in one engine, measured in a process of its own.

    threads: of the CPU; prompt_tokens, new_tokens: the measured request; repeats: rates and times
    are medians of so many. weights_bytes: the parameters as the engine holds them;
    resident_bytes, peak_bytes: memory of the whole process after loading, and at its peak;
    device_peak_bytes: what torch held on a GPU at most. Tokens are decoded by a loop in Python; the
    figures with ``graphs`` are of CUDA graphs, which only a GPU has. ttft_ms: time from a prompt to
    the first token; tpot_ms: time of each further token at batch 1.
    A figure that the engine can't give is None, and ``missing`` has the reason by the figure's
    name.
    """

    engine: str
    device: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    weights_bytes: int | None = None
    resident_bytes: int | None = None
    peak_bytes: int | None = None
    device_peak_bytes: int | None = None
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    decode_tokens_per_second_batch8: float | None = None
    decode_tokens_per_second_graphs: float | None = None
    decode_tokens_per_second_batch8_graphs: float | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Costs:
    """The costs of all models of a comparison.

    baseline_gguf: of the baseline written as BF16 GGUF, which GGUF artifacts are compared with.
    """

    baseline: Cost | None
    baseline_gguf: Cost | None
    artifacts: tuple[Cost, ...]
