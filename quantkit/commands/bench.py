"""bench: what artifacts take to run: memory, latency and throughput."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from quantkit.base.errors import InputError
from quantkit.base.files import write_json
from quantkit.base.progress import Progress
from quantkit.checkpoint.reader import Checkpoint
from quantkit.engines.choose import LLAMACPP, engine_for
from quantkit.engines.probe import Probe, run_probe
from quantkit.judging.naming import named_artifacts
from quantkit.judging.variants import describe_costs
from quantkit.model.device import resolve_device
from quantkit.results.comparison import Variant
from quantkit.results.cost import Cost, Costs, Load


def bench(
    artifacts: Sequence[Path], baseline: Checkpoint | None, load: Load, progress: Progress
) -> tuple[Variant, ...]:
    """Measure artifacts, and the baseline where one is given; returns a row for each.

    Raises QuantkitError, see ``measure_costs``.
    """
    return describe_costs(baseline, artifacts, measure_costs(artifacts, baseline, load, progress))


def write_rows(rows: Sequence[Variant], out: Path) -> None:
    """Write the rows of a benchmark to ``out`` as JSON."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, [row.to_json() for row in rows])


def measure_costs(
    artifacts: Sequence[Path], baseline: Checkpoint | None, load: Load, progress: Progress
) -> Costs:
    """Measure the baseline, its BF16 GGUF where an artifact is GGUF, and every artifact.

    Each is measured in a process of its own. Adapters of the baseline are left out: once merged,
    they cost nothing.

    Raises InputError for a load too small to be timed, MachineError when a process dies. An engine
    that isn't installed leaves its figures empty, with the reason.
    """
    if load.prompt_tokens < 1 or load.new_tokens < 2 or load.repeats < 1:
        raise InputError(
            "needs at least 1 prompt token, 2 new tokens and 1 repeat", subject="bench"
        )
    named = named_artifacts(artifacts, baseline)
    jobs = [(name, *engine_for(path)) for name, path in named.items()]
    with tempfile.TemporaryDirectory(prefix="quantkit-") as folder:
        first: list[tuple[str, str, Path]] = []
        with_gguf = baseline is not None and any(engine == LLAMACPP for _, engine, _ in jobs)
        if baseline is not None:
            first.append(("baseline", *engine_for(baseline.directory)))
        if baseline is not None and with_gguf:
            # An optional package writes GGUF; without a GGUF artifact it isn't needed.
            from quantkit.formats.gguf.writer import write_bf16

            path = Path(folder) / "bf16.gguf"
            write_bf16(path, baseline)
            first.append(("baseline as GGUF", LLAMACPP, path))
        costs = []
        with progress.task("measure", len(first) + len(jobs)) as task:
            for name, engine, path in first + jobs:
                task.advance(0, doing=name)
                costs.append(_measure_in_process(path, engine, load, name))
                task.advance()
    return Costs(
        baseline=costs[0] if baseline is not None else None,
        baseline_gguf=costs[1] if with_gguf else None,
        artifacts=tuple(costs[len(first) :]),
    )


def _measure_in_process(path: Path, engine: str, load: Load, name: str) -> Cost:
    probe = Probe(
        path=str(path),
        engine=engine,
        device="cpu" if engine == LLAMACPP else str(resolve_device(load.device)),
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
