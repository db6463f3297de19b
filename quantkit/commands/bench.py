"""measure: artifact × engine → memory, latency, throughput, each in a fresh process."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantkit.base.errors import InputError
from quantkit.base.progress import Progress
from quantkit.checkpoint.reader import Checkpoint
from quantkit.engines.choose import engine_for
from quantkit.engines.probe import Probe, run_probe
from quantkit.model.device import resolve_device
from quantkit.results.cost import Cost, Costs


@dataclass(frozen=True)
class Load:
    """What every engine is asked to do."""

    prompt_tokens: int = 128
    new_tokens: int = 32
    repeats: int = 3
    threads: int | None = None
    device: str = "cpu"


def measure(
    artifacts: Sequence[Path],
    baseline: Checkpoint | None,
    load: Load,
    progress: Progress,
) -> Costs:
    """Measure the baseline, its BF16 GGUF where an artifact is GGUF, and every artifact.

    Adapters in the baseline are left out: merged, they cost nothing.

    Raises MachineError when a process dies; an engine that isn't there leaves its figures
    empty, with the reason.
    """
    if load.prompt_tokens < 1 or load.new_tokens < 2 or load.repeats < 1:
        raise InputError(
            "needs at least 1 prompt token, 2 new tokens and 1 repeat", subject="bench"
        )
    jobs = [(path.name, *engine_for(path)) for path in artifacts]
    with tempfile.TemporaryDirectory(prefix="quantkit-") as folder:
        first: list[tuple[str, str, Path]] = []
        with_gguf = baseline is not None and any(job[1] == "llama.cpp" for job in jobs)
        if baseline is not None:
            first.append(("baseline", *engine_for(baseline.directory)))
        if baseline is not None and with_gguf:
            from quantkit.formats.gguf.writer import write_bf16

            path = Path(folder) / "bf16.gguf"
            write_bf16(path, baseline)
            first.append(("baseline as GGUF", "llama.cpp", path))
        costs = []
        with progress.task("measure", len(first) + len(jobs)) as task:
            for name, engine, path in first + jobs:
                task.advance(0, doing=name)
                costs.append(_in_process(path, engine, load, name))
                task.advance()
    reference = costs[0] if baseline is not None else None
    gguf = costs[1] if with_gguf else None
    return Costs(reference, gguf, tuple(costs[len(first) :]))


def _in_process(path: Path, engine: str, load: Load, name: str) -> Cost:
    probe = Probe(
        path=str(path),
        engine=engine,
        device=str(resolve_device(load.device)) if engine == "transformers" else "cpu",
        threads=load.threads or usable_cores(),
        prompt_tokens=load.prompt_tokens,
        new_tokens=load.new_tokens,
        repeats=load.repeats,
    )
    return run_probe(probe, name)


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
