"""Running the tools: every run a fresh process, measured by the operating system."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

from benchmarks import environments, processes
from benchmarks.peers.jobs import JOBS, Tool
from benchmarks.printing import say, slug

ROOT = Path(__file__).resolve().parents[2]
SMALL_MODELS = ("tiny", "82m")
WEIGHTS = (".safetensors", ".gguf", ".bin")
# No tool may spend its time on looking something up on a hub.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Run:
    """One process that did one job. Times in seconds, sizes in bytes.

    parameters: elements of the model's tensors. number: of the run, from 0.
    weights: size of the files with weights that it wrote.
    error: its last message when it failed, else None.
    """

    parameters: int
    model: str
    device: str
    job: str
    tool: str
    number: int
    wall: float
    cpu: float
    peak: int
    weights: int
    error: str | None

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """What tells a run from all others of a benchmark."""
        return self.model, self.device, self.job, self.tool, self.number


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    jobs: list[str]
    peers: list[str]
    models: list[str]
    runs: int
    device: str
    work: Path
    environments: Path
    timeout: float
    out: Path

    def tools(self, job: str, model: str) -> list[Tool]:
        """The tools that do a job on a model."""
        too_slow = self.device == "cpu" and model not in SMALL_MODELS
        return [
            tool
            for tool in JOBS[job]
            if (tool.name in self.peers or tool.is_ours or job == "idle")
            and not (tool.small and too_slow)
        ]


def read_runs(record: Path) -> list[Run]:
    """The runs of an earlier benchmark that didn't fail."""
    runs = [Run(**run) for run in json.loads(record.read_text())["runs"]]
    return [run for run in runs if run.error is None]


def bench(options: Options, kept: Sequence[Run]) -> Iterator[Run]:
    """Yield every run of the benchmark: first the ``kept`` ones, then each new one as it ends."""
    yield from kept
    done = {run.key for run in kept}
    reasons = make_environments(options)
    for model in options.models:
        feed = make_feed(model, options.work)
        size = parameters(feed / "model")
        for job in options.jobs:
            failed: set[str] = set()
            # Number outside, tool inside: what slows the machine for a while slows all tools.
            for number in range(options.runs):
                for tool in options.tools(job, model):
                    key = (model, options.device, job, tool.name, number)
                    if tool.name in failed or key in done:
                        continue
                    if tool.environment in reasons:
                        measured = processes.Measured(0.0, 0.0, 0, reasons[tool.environment])
                        weights = 0
                    else:
                        measured, weights = measure(tool, job, feed, options)
                    if measured.error:
                        failed.add(tool.name)  # it would fail again
                    say(f"{model} {job}, {tool.name}, run {number + 1}: {outcome(measured)}")
                    yield Run(size, *key, **asdict(measured), weights=weights)


def make_environments(options: Options) -> dict[str, str]:
    """Make the environments that the tools need; for each that can't be made, the reason."""
    needed = {
        tool.environment
        for model in options.models
        for job in options.jobs
        for tool in options.tools(job, model)
        if tool.environment
    }
    reasons = {}
    for name in sorted(needed):
        try:
            environments.make(name, options.environments)
        except environments.EnvironmentFailed as failure:
            reasons[name] = f"can't be installed: {failure}"
            say(f"{name}: {reasons[name]}")
    return reasons


def make_feed(model: str, work: Path) -> Path:
    """The folder with checkpoint, adapter and calibration rows. Stops when it can't be made."""
    # In a process of its own: this one must stay small, see processes.py.
    command = [sys.executable, "-m", "benchmarks.models", model, "--work", str(work)]
    subprocess.run(command, check=True, cwd=ROOT)
    return work / model


def measure(tool: Tool, job: str, feed: Path, options: Options) -> tuple[processes.Measured, int]:
    """Run a tool once; returns the process as measured and the bytes of the weights it wrote."""
    out = options.work / "out"
    for left in (out, out.with_name("out.partial")):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    values = {"feed": str(feed), "out": str(out), "device": options.device}
    python = sys.executable
    if tool.environment:
        python = str(environments.python_of(tool.environment, options.environments))
    command = [python, *(part.format(**values) for part in tool.arguments)]
    # Without PYTHONPATH, or a peer could import a folder of this checkout for a library of its own.
    settings = OFFLINE | ({"PYTHONPATH": ""} if tool.environment else {})
    logs = options.work / "logs"
    logs.mkdir(exist_ok=True)
    log = logs / f"{feed.name}-{job}-{slug(tool.name)}.log"
    measured = processes.run(command, log, timeout=options.timeout, settings=settings)
    weights = sum(file.stat().st_size for file in out.rglob("*") if file.suffix in WEIGHTS)
    shutil.rmtree(out, ignore_errors=True)
    return measured, weights


def parameters(model: Path) -> int:
    """Elements of all tensors of a checkpoint, by the headers of its safetensors files."""
    total = 0
    for path in model.glob("*.safetensors"):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        total += sum(prod(tensor["shape"]) for tensor in header.values())
    return total


def outcome(measured: processes.Measured) -> str:
    """How a run ended, for the progress on stderr."""
    if measured.error:
        return measured.error
    return f"{measured.wall:.1f} s, {measured.peak / 1e9:.2f} GB"
