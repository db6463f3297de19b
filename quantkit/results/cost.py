"""What running an artifact takes: memory, time and rates."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Load:
    """What every engine is asked to do when its cost is measured.

    One prompt of ``prompt_tokens`` is read and ``new_tokens`` are generated, ``repeats`` times;
    the median counts. threads: of the CPU, all cores if None; device: of the engine transformers,
    the others run on the CPU.
    """

    prompt_tokens: int = 128
    new_tokens: int = 32
    repeats: int = 3
    threads: int | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Cost:
    """What running it takes, measured in a fresh process.

    weights_bytes: parameters as the engine holds them; resident_bytes after loading and
    peak_bytes at the end, of the whole process; rates in tokens a second, medians of ``repeats``;
    ttft_ms: time to the first token of a ``prompt_tokens`` prompt; tpot_ms: time for each
    further token at batch 1. A figure that the engine can't give is None, and ``missing`` says why.
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
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    decode_tokens_per_second_batch8: float | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Costs:
    """What measuring gives: the baseline, its BF16 GGUF, and each artifact."""

    baseline: Cost | None
    baseline_gguf: Cost | None
    artifacts: tuple[Cost, ...]
