"""The same jobs by quantkit and llm-compressor on one GPU: time and memory, whole processes.

    python -m benchmarks.gpu [--shape 2b-8] [--jobs gptq awq …] [--out benchmarks/RESULTS-GPU.md]

makes a model of random weights and calibration rows (``benchmarks.gpu_feed``), warms the disk cache
by a process of each tool that only imports, and writes the page anew after every run. Both tools
calibrate on the same token ids. llm-compressor runs in ``--peer-python``; ``--ours-path`` and
``--peer-path`` are folders for the PYTHONPATH of one tool alone, for a machine where the two need
other versions of a package. A process that takes longer than ``--limit`` is killed, and none
begins after ``--within``, which nothing that began exceeds. Without a GPU everything runs on the
CPU, to try the script: ``--shape tiny --samples 4 --sequence-length 128``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median

from benchmarks import machine, processes
from benchmarks.peers.jobs import OURS, SCRIPTS
from benchmarks.peers.runs import OFFLINE, WEIGHTS, parameters
from benchmarks.printing import say, slug

ROOT = Path(__file__).resolve().parent.parent
PEER = "llm-compressor"
# Recipe of ours; the peer's job where it has one.
JOBS = {
    "gptq": ("gptq-w4-g128", "gptq"),
    "awq": ("awq-w4-g128", "awq"),
    "gguf-gptq": ("gguf-q4-k-m-gptq", None),
    "gguf-corrected": ("gguf-q4-k-m-corrected", None),
}
PACKAGES = ("torch", "triton", "transformers", "llmcompressor", "compressed-tensors", "xllamacpp")
POLL = 0.1  # seconds
_PEAK = re.compile(r"^torch\.cuda peak: (\d+) allocated", re.MULTILINE)


@dataclass(frozen=True)
class Tool:
    """A tool of this benchmark: its interpreter, the environment's settings, why it can't run."""

    name: str
    python: str
    settings: dict[str, str]
    missing: str | None = None


@dataclass(frozen=True)
class Run:
    """One process. device: bytes that it took of the GPU by the driver; torch: by torch itself.

    Both are None where there is none to ask.
    """

    job: str
    tool: str
    measured: processes.Measured
    weights: int
    device: int | None
    torch: int | None


def used_memory() -> int | None:
    """Bytes in use on the first GPU, by the driver; None where there is none."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)
    except Exception:  # of the library's own kinds, which can't be named where it isn't installed
        pass
    command = ["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return int(subprocess.run(command, capture_output=True, check=True).stdout) * 2**20
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None


@dataclass
class Gauge:
    """What the GPU's memory in use grew by at most, over what it was when this was made."""

    before: int = 0
    peak: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Ask the driver again and again while the block runs, from a thread."""
        self.peak = 0
        self._stop.clear()
        thread = threading.Thread(target=self._poll)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def _poll(self) -> None:
        while not self._stop.wait(POLL):
            self.peak = max(self.peak, (used_memory() or 0) - self.before)


def settings_of(options: argparse.Namespace, path: Sequence[str | Path]) -> dict[str, str]:
    """The variables of a tool's processes, with these folders on its PYTHONPATH."""
    settings = OFFLINE | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    return settings if options.device == "cuda" else settings | {"CUDA_VISIBLE_DEVICES": ""}


def our_tool(options: argparse.Namespace) -> Tool:
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = [*options.ours_path, ROOT, *filter(None, inherited)]
    return Tool(OURS, sys.executable, settings_of(options, path))


def their_tool(options: argparse.Namespace) -> Tool:
    """llm-compressor, after a process that imports all that a job of it does."""
    settings = settings_of(options, options.peer_path)
    log = options.work / "logs" / "imports-peer.log"
    code = (
        "import llmcompressor, datasets, torch, transformers\n"
        "from llmcompressor.modifiers.quantization import GPTQModifier\n"
        "from llmcompressor.modifiers.awq import AWQModifier\n"
        "if torch.cuda.is_available(): torch.ones(1, device='cuda')"
    )
    if shutil.which(options.peer_python) is None:
        return Tool(PEER, sys.executable, settings, f"no such interpreter: {options.peer_python}")
    measured = processes.run([options.peer_python, "-c", code], log, settings=settings)
    missing = f"not installed here: {measured.error}" if measured.error else None
    return Tool(PEER, options.peer_python, settings, missing)


def command_of(
    tool: Tool, job: str, feed: Path, out: Path, options: argparse.Namespace
) -> list[str]:
    """The process that does a job."""
    recipe, peer_job = JOBS[job]
    start = [tool.python, str(ROOT / "benchmarks" / "peak.py")]
    if tool.name == PEER:
        place = ["--feed", str(feed), "--out", str(out), "--device", options.device]
        return [*start, str(SCRIPTS / "llm_compressor.py"), str(peer_job), *place]
    settings = (
        f"calibration.dataset={feed / 'calibration.jsonl'}",
        f"calibration.samples={options.samples}",
        f"calibration.sequence_length={options.sequence_length}",
    )
    flags = [part for setting in settings for part in ("--set", setting)]
    place = ["--model", str(feed / "model"), "--out", str(out), "--device", options.device]
    return [*start, "-m", "quantkit.cli", "quantize", recipe, "--no-cache", *place, *flags]


def make_feed(options: argparse.Namespace) -> Path:
    """Make model and rows in a process of its own, and the weights on the GPU if there is one."""
    size = f"{options.samples}x{options.sequence_length}"
    feed: Path = options.work / f"{options.shape}-{options.device}-{size}"
    sizes = ["--samples", options.samples, "--sequence-length", options.sequence_length]
    arguments = ["-m", "benchmarks.gpu_feed", options.shape, feed, "--device", options.device]
    tool = our_tool(options)
    command = [tool.python, *map(str, [*arguments, *sizes])]
    if code := subprocess.run(command, cwd=ROOT, env=os.environ | tool.settings).returncode:
        raise SystemExit(code)  # it said why
    return feed


def measure(
    tool: Tool, job: str, feed: Path, gauge: Gauge | None, limit: float, options: argparse.Namespace
) -> Run:
    """Do a job once, in ``limit`` seconds at most."""
    out = options.work / "out"
    for left in (out, out.with_name("out.partial")):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    log = options.work / "logs" / f"{job}-{slug(tool.name)}.log"
    command = command_of(tool, job, feed, out, options)
    with gauge.watching() if gauge else nullcontext():
        measured = processes.run(command, log, timeout=limit, settings=tool.settings)
    text = log.read_text(encoding="utf-8", errors="replace")
    told = _PEAK.search(text)
    weights = sum(file.stat().st_size for file in out.rglob("*") if file.suffix in WEIGHTS)
    shutil.rmtree(out, ignore_errors=True)
    say("\n".join(text.splitlines()[-options.tail :]) if options.tail else "")
    return Run(
        job,
        tool.name,
        measured,
        weights,
        gauge.peak if gauge else None,
        int(told[1]) if told else None,
    )


def bench(feed: Path, tools: Sequence[Tool], options: argparse.Namespace) -> Iterator[Run]:
    """Yield every run as it ends: the tools in turn on each job."""
    before = used_memory() if options.device == "cuda" else None
    gauge = None if before is None else Gauge(before)
    started = time.monotonic()
    for job in options.jobs:
        for number in range(options.runs):
            for tool in tools:
                if tool.name == PEER and JOBS[job][1] is None:
                    continue
                left = options.within - (time.monotonic() - started)
                if reason := tool.missing or (None if left > 0 else "not begun: no time was left"):
                    failed = processes.Measured(0.0, 0.0, 0, reason)
                    run = Run(job, tool.name, failed, 0, None, None)
                else:
                    run = measure(tool, job, feed, gauge, min(options.limit, left), options)
                error = run.measured.error
                say(
                    f"{job}, {tool.name}, run {number + 1}: {error or f'{run.measured.wall:.1f} s'}"
                )
                yield run


COLUMNS = (
    "| job | tool | wall s | CPU s | host GB | GPU GB | of it torch's | MB | wall × | GPU × |",
    "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
)


def row(runs: Sequence[Run], ours: Sequence[Run]) -> str:
    """One tool on one job: medians of time, the most of memory; ratios are ours over theirs."""
    head = f"| {runs[0].job} | {runs[0].tool} |"
    errors = [run.measured.error for run in runs if run.measured.error]
    if errors:
        # As processes.run words it.
        stopped = re.fullmatch(r"stopped after (\d+ s)", errors[0])
        return f"{head} {f'> {stopped[1]}' if stopped else errors[0].replace('|', '/')} {'| ' * 7}|"
    walls = [run.measured.wall for run in runs]
    wall = f"{median(walls):.1f}"
    if len(walls) > 1:
        wall += f" ({', '.join(f'{it:.1f}' for it in walls)})"
    cells = [wall, f"{median(run.measured.cpu for run in runs):.1f}"]
    cells.append(f"{max(run.measured.peak for run in runs) / 1e9:.2f}")
    cells += [_gigabytes(_most(runs, "device")), _gigabytes(_most(runs, "torch"))]
    cells.append(f"{runs[-1].weights / 1e6:,.1f}")
    comparable = runs[0].tool == PEER and ours and not any(run.measured.error for run in ours)
    if comparable:
        cells.append(f"{median(run.measured.wall for run in ours) / median(walls):.2f}")
        mine, theirs = _most(ours, "device"), _most(runs, "device")
        cells.append(f"{mine / theirs:.2f}" if mine and theirs else "–")
    else:
        cells += ["", ""]
    return f"{head} {' | '.join(cells)} |"


def _most(runs: Sequence[Run], what: str) -> int | None:
    values = [value for run in runs if (value := getattr(run, what)) is not None]
    return max(values, default=None)


def _gigabytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e9:.2f}"


def render(head: Sequence[str], runs: Sequence[Run]) -> str:
    """The whole page."""
    lines = [*head, "", *COLUMNS]
    for job in dict.fromkeys(run.job for run in runs):
        on_job = [run for run in runs if run.job == job]
        ours = [run for run in on_job if run.tool == OURS]
        for tool in dict.fromkeys(run.tool for run in on_job):
            lines.append(row([run for run in on_job if run.tool == tool], ours))
    return "\n".join(lines) + "\n"


def describe(feed: Path, tools: Sequence[Tool], options: argparse.Namespace) -> list[str]:
    """The lines above the table: what was done, where, with what."""
    rows = json.loads((feed / "rows.json").read_text())
    mixture = "num_experts" in json.loads((feed / "model" / "config.json").read_text())
    kind = "a mixture of experts" if mixture else "a Llama"
    where = machine.gpu() if options.device == "cuda" else "CPU"
    lines = [
        "# quantkit and llm-compressor on a GPU",
        "",
        f"Made by `python -m benchmarks.gpu`. {options.shape}: {kind} of "
        f"{parameters(feed / 'model') / 1e9:,.2f} billion random parameters, {len(rows)} × "
        f"{len(rows[0])} tokens, the same ids for both tools. Each run is a whole process: start, "
        "load, quantize, save. Imports were warm; quantkit's Triton kernels are compiled in the "
        "first run that needs them, and it counts. llm-compressor runs with its own defaults. GPU "
        "memory: what the driver showed beyond what was in use before, asked "
        f"every {POLL} s; and torch.cuda.max_memory_allocated. Wall times are medians, memory is "
        "the most of all runs. Ratios: quantkit ÷ llm-compressor; below 1 quantkit needs less.",
        "",
        f"{datetime.now().astimezone().isoformat(timespec='minutes')} · {where} · "
        f"{machine.processor()}, {os.cpu_count()} cores · quantkit {machine.commit()}",
        "",
    ]
    for tool in tools:
        versions = machine.installed(tool.python, PACKAGES, tool.settings)
        lines.append(f"* {tool.name}: {versions}")
    return lines


def _at_least_one(text: str) -> int:
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return count


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=JOBS, metavar="JOB")
    parser.add_argument("--shape", default="2b-8", help="of benchmarks/models.py")
    parser.add_argument("--tools", default="both", choices=("ours", "peer", "both"))
    parser.add_argument("--samples", type=_at_least_one, default=128)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--runs", type=_at_least_one, default=1, help="of every tool on every job")
    parser.add_argument("--limit", type=float, default=200.0, help="seconds for one process")
    parser.add_argument("--within", type=float, default=3600.0, help="seconds for all of them")
    parser.add_argument("--cold", action="store_true", help="don't import once before measuring")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--peer-path", nargs="*", default=[], metavar="FOLDER")
    parser.add_argument("--ours-path", nargs="*", default=[], metavar="FOLDER")
    parser.add_argument("--tail", type=int, default=0, help="lines of each log to show")
    parser.add_argument("--work", type=Path, default=Path("reports/bench-gpu"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "RESULTS-GPU.md")
    options = parser.parse_args(arguments)
    if options.device == "auto":
        options.device = "cuda" if machine.gpu() else "cpu"
    options.work = options.work.resolve()
    return options


def main() -> None:
    options = parse()
    (options.work / "logs").mkdir(parents=True, exist_ok=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    feed = make_feed(options)
    tools = []
    if options.tools != "peer":
        tools.append(our_tool(options))
        if not options.cold:
            # A rehearsal imports what the run will, and reads the model.
            command = command_of(tools[0], options.jobs[0], feed, options.work / "out", options)
            log = options.work / "logs" / "imports-ours.log"
            processes.run([*command, "--dry-run"], log, settings=tools[0].settings)
    if options.tools != "ours":
        tools.append(their_tool(options))
    head = describe(feed, tools, options)
    done: list[Run] = []
    for run in bench(feed, tools, options):
        done.append(run)
        page = render(head, done)
        options.out.write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
