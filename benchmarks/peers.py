"""The same jobs by quantkit and by its peers: time, memory, size of what comes out.

    python benchmarks/peers.py [--jobs JOB...] [--peers PEER...] [--models MODEL...] [--runs N]

Every run is a process of its own, from loading to the saved artifact, one after the other, ours
and theirs in turn. What a tool takes is counted by the operating system: wall time, CPU time of
all its processes, resident memory of the largest of them. All calibrate on the same token ids.
A tool that fails is a row with what it said last.

Checkpoints, logs and artifacts (deleted once measured) lie under --work, the peers' environments
under --environments; both are kept. The table goes to --out, every single run to the .json beside
it, after each run: --resume goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import environments
import machine
import processes

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
MODELS = ("82m", "1.1b")
SMALL_MODELS = ("tiny", "82m")
WEIGHTS = (".safetensors", ".gguf", ".bin")
OURS = "quantkit"
OUR_PACKAGES = ("torch", "transformers", "bitsandbytes", "peft", "gguf", "xllamacpp")
# Nothing is looked up on a hub, and no tool imports what lies in this checkout by accident.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Tool:
    """One way to do a job.

    arguments: what its interpreter is told; {feed}, {out} and {device} are filled in.
    environment: whose interpreter; ours when None.
    small: on a CPU only worth running on the smallest models.
    """

    name: str
    arguments: tuple[str, ...]
    environment: str | None = None
    small: bool = False
    note: str = ""

    @property
    def is_ours(self) -> bool:
        return self.name.startswith(OURS)


def ours(recipe: str, *settings: str, name: str = OURS) -> Tool:
    """Quantkit by a shipped recipe."""
    flags = [part for setting in settings for part in ("--set", setting)]
    place = ("--model", "{feed}/model", "--out", "{out}", "--device", "{device}")
    return Tool(name, ("-m", "quantkit.cli", "quantize", recipe, "--no-cache", *place, *flags))


def peer(
    name: str,
    job: str,
    script: str,
    environment: str | None,
    *,
    small: bool = False,
    note: str = "",
) -> Tool:
    """A peer by its script in benchmarks/peer_jobs."""
    path = str(BENCHMARKS / "peer_jobs" / script)
    arguments = (path, job, "--feed", "{feed}", "--out", "{out}", "--device", "{device}")
    return Tool(name, arguments, environment, small, note)


SAMPLES = "calibration.samples=16"
GPTQMODEL_NOTE = (
    "with fewer than three cores GPTQMODEL_CPU_WORKERS=2 is set, without which it raises at "
    "import; made with an older torch than it asks for"
)
JOBS: dict[str, tuple[Tool, ...]] = {
    "gptq": (
        *(
            ours(
                "gptq-w4-g128",
                SAMPLES,
                f"quantize.propagate={propagate}",
                name=f"{OURS}, propagate: {propagate}",
            )
            for propagate in ("original", "quantized", "corrected")
        ),
        peer("llm-compressor", "gptq", "llm_compressor.py", "llm-compressor"),
        peer("GPTQModel", "gptq", "gptq_model.py", "gptqmodel", note=GPTQMODEL_NOTE),
        peer(
            "AutoRound",
            "gptq",
            "autoround.py",
            "auto-round",
            small=True,
            note="another method, 200 iterations of signed gradient descent",
        ),
    ),
    "awq": (
        ours("awq-w4-g128", SAMPLES),
        peer(
            "AutoAWQ",
            "awq",
            "auto_awq.py",
            "autoawq",
            small=True,
            note="archived; with the last transformers it was made for",
        ),
        peer("llm-compressor", "awq", "llm_compressor.py", "llm-compressor"),
        peer("GPTQModel", "awq", "gptq_model.py", "gptqmodel", small=True, note=GPTQMODEL_NOTE),
    ),
    "q4_k_m": (
        ours("gguf-q4-k-m", "calibration=null"),
        peer(
            "llama.cpp",
            "q4_k_m",
            "llama_cpp.py",
            "llama.cpp",
            note="convert_hf_to_gguf.py to a BF16 file, then llama-quantize",
        ),
    ),
    "q4_k_m-imatrix": (
        ours("gguf-q4-k-m", SAMPLES),
        ours("gguf-q4-k-m-gptq", SAMPLES, name=f"{OURS}, error feedback"),
        ours("gguf-q4-k-m-corrected", SAMPLES, name=f"{OURS}, error feedback, corrected"),
        peer(
            "llama.cpp",
            "q4_k_m-imatrix",
            "llama_cpp.py",
            "llama.cpp",
            note="as above, with llama-imatrix on as many tokens of the same text",
        ),
    ),
    "nf4": (ours("nf4"), peer("transformers + bitsandbytes", "nf4", "hf_nf4.py", None)),
    "merge": (
        Tool(
            OURS,
            (
                *("-m", "quantkit.cli", "merge", "{feed}/model", "{feed}/adapter"),
                *("--out", "{out}", "--no-proof"),
            ),
        ),
        peer("PEFT", "merge", "hf_merge.py", None, note="merge_and_unload, save_pretrained"),
    ),
    "idle": (
        Tool("import torch", ("-c", "import torch")),
        Tool("import torch, transformers", ("-c", "import torch, transformers")),
    ),
}
TITLES = {
    "gptq": "GPTQ, 4 bits symmetric, groups of 128, 16 × 512 tokens",
    "awq": "AWQ, 4 bits asymmetric, groups of 128, 16 × 512 tokens",
    "q4_k_m": "GGUF Q4_K_M without importance weights",
    "q4_k_m-imatrix": "GGUF Q4_K_M with importance weights of 16 × 512 tokens",
    "nf4": "NF4 with double quantization",
    "merge": "Merging a LoRA adapter of rank 64, BF16",
    "idle": "What only importing costs",
}


@dataclass(frozen=True)
class Run:
    """One process. Seconds, bytes; what it said last when it failed.

    parameters: of the model. weights: bytes of the files with weights that it wrote.
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


@dataclass(frozen=True)
class Options:
    """The command line."""

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
        """Who does a job on a model."""
        skipped = self.device == "cpu" and model not in SMALL_MODELS
        return [
            tool
            for tool in JOBS[job]
            if (tool.name in self.peers or tool.is_ours or job == "idle")
            and not (tool.small and skipped)
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=JOBS, metavar="JOB")
    peers = list(dict.fromkeys(t.name for ts in JOBS.values() for t in ts if not t.is_ours))
    parser.add_argument("--peers", nargs="*", default=peers, choices=peers, metavar="PEER")
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="MODEL")
    parser.add_argument("--runs", type=int, default=1, help="of every tool; medians are shown")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--work", type=Path, default=Path("reports/bench"))
    parser.add_argument("--environments", type=Path, default=environments.DIRECTORY)
    parser.add_argument("--timeout", type=float, default=7200.0, help="seconds for one process")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "RESULTS.md")
    parser.add_argument("--resume", action="store_true", help="keep the runs that --out.json has")
    parser.add_argument("--list", action="store_true", help="say what there is, run nothing")
    given = vars(parser.parse_args())
    if given.pop("list"):
        for job, tools in JOBS.items():
            print(f"{job}: {TITLES[job]}\n    {'; '.join(tool.name for tool in tools)}")
        return
    resume = given.pop("resume")
    if given["device"] == "auto":
        given["device"] = "cuda" if machine.gpu() else "cpu"
    given["work"] = given["work"].resolve()
    options = Options(**given)
    record = options.out.with_suffix(".json")
    kept = read_runs(record) if resume and record.is_file() else []
    report(options, bench(options, kept))


def report(options: Options, runs: Iterable[Run]) -> None:
    """Write the results after every run."""
    setting = describe_setting(options)
    done: list[Run] = []
    for run in runs:
        done.append(run)
        document = {**setting, "runs": [asdict(run) for run in done]}
        options.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
        options.out.write_text(render(setting, done), encoding="utf-8")


def read_runs(record: Path) -> list[Run]:
    """The runs of an earlier benchmark that didn't fail."""
    runs = [Run(**run) for run in json.loads(record.read_text())["runs"]]
    return [run for run in runs if run.error is None]


def bench(options: Options, kept: Sequence[Run]) -> Iterator[Run]:
    """Every run of the benchmark; those kept first."""
    yield from kept
    have = {(run.model, run.device, run.job, run.tool, run.number) for run in kept}
    unmade = make_environments(options)
    for model in options.models:
        feed = make_feed(model, options.work)
        size = parameters(feed / "model")
        for job in options.jobs:
            tools = options.tools(job, model)
            failed: set[str] = set()
            for number in range(options.runs):
                for tool in tools:
                    key = (model, options.device, job, tool.name, number)
                    if tool.name in failed or key in have:
                        continue
                    if tool.environment in unmade:
                        measured = processes.Measured(0.0, 0.0, 0, unmade[tool.environment])
                        weights = 0
                    else:
                        measured, weights = measure(tool, job, feed, options)
                    if measured.error:
                        failed.add(tool.name)
                    say(f"{model} {job}, {tool.name}, run {number + 1}: {outcome(measured)}")
                    yield Run(size, *key, **asdict(measured), weights=weights)


def make_environments(options: Options) -> dict[str, str]:
    """Make the environments that will be needed; of those that can't be made, why."""
    needed = {
        tool.environment
        for model in options.models
        for job in options.jobs
        for tool in options.tools(job, model)
        if tool.environment
    }
    unmade = {}
    for name in sorted(needed):
        try:
            environments.make(name, options.environments)
        except environments.EnvironmentFailed as failure:
            unmade[name] = f"can't be installed: {failure}"
            say(f"{name}: {unmade[name]}")
    return unmade


def make_feed(model: str, work: Path) -> Path:
    """The folder with checkpoint, adapter and calibration rows. Stops when it can't be made."""
    script = [sys.executable, str(BENCHMARKS / "models.py"), model, "--work", str(work)]
    subprocess.run(script, check=True, cwd=ROOT)
    return work / model


def measure(tool: Tool, job: str, feed: Path, options: Options) -> tuple[processes.Measured, int]:
    """Run a tool once; what it took, and the bytes of the weights that it wrote."""
    out = options.work / "out"
    for left in (out, out.with_name("out.partial")):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    filled = {"feed": str(feed), "out": str(out), "device": options.device}
    python = sys.executable
    if tool.environment:
        python = str(environments.python_of(tool.environment, options.environments))
    command = [python, *(part.format(**filled) for part in tool.arguments)]
    settings = OFFLINE | ({"PYTHONPATH": ""} if tool.environment else {})
    logs = options.work / "logs"
    logs.mkdir(exist_ok=True)
    log = logs / f"{feed.name}-{job}-{slug(tool.name)}.log"
    measured = processes.run(command, log, timeout=options.timeout, settings=settings)
    weights = sum(file.stat().st_size for file in out.rglob("*") if file.suffix in WEIGHTS)
    shutil.rmtree(out, ignore_errors=True)
    return measured, weights


def slug(text: str) -> str:
    """A name that is fit for a file."""
    return "".join(letter if letter.isalnum() else "-" for letter in text.lower())


def describe_setting(options: Options) -> dict[str, Any]:
    """Date, machine and versions: what the figures depend on."""
    variables = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    return {
        "date": datetime.now().astimezone().isoformat(timespec="minutes"),
        "machine": {
            "processor": machine.processor(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": platform.platform(),
            "python": platform.python_version(),
            "load": round(os.getloadavg()[0], 2),
            "device": machine.gpu() if options.device == "cuda" else "cpu",
            "variables": {name: os.environ[name] for name in variables if name in os.environ},
        },
        "versions": {OURS: machine.commit(), **versions(options)},
    }


def versions(options: Options) -> dict[str, str]:
    """The distributions that matter, for every environment that is there."""
    found = {"ours, transformers, PEFT": machine.installed(sys.executable, OUR_PACKAGES)}
    for name, environment in environments.ENVIRONMENTS.items():
        python = environments.python_of(name, options.environments)
        if python.is_file():
            found[name] = machine.installed(str(python), environment.shown)
    if "llama.cpp" in found:
        found["llama.cpp"] = f"of {environments.LLAMA_CPP}; {found['llama.cpp']}"
    return found


def parameters(model: Path) -> int:
    """Elements of all tensors of a checkpoint, by the headers of its files."""
    total = 0
    for path in model.glob("*.safetensors"):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        total += sum(prod(tensor["shape"]) for tensor in header.values())
    return total


@dataclass(frozen=True)
class Figures:
    """A tool on a job: medians of the times, the largest peak, the range of the wall times."""

    wall: float
    low: float
    high: float
    cpu: float
    peak: int
    weights: int
    error: str | None

    @staticmethod
    def of(runs: Sequence[Run]) -> Figures:
        walls = [run.wall for run in runs]
        return Figures(
            wall=median(walls),
            low=min(walls),
            high=max(walls),
            cpu=median(run.cpu for run in runs),
            peak=max(run.peak for run in runs),
            weights=runs[-1].weights,
            error=next((run.error for run in runs if run.error), None),
        )


def render(setting: Mapping[str, Any], runs: Sequence[Run]) -> str:
    """All results as Markdown."""
    host = setting["machine"]
    lines = [
        "# quantkit and its peers",
        "",
        "Made by `make bench-peers`. Each run is a whole process: load, quantize, save. Medians of "
        "the runs (the range of the wall times in brackets); peak: resident memory of the largest "
        "process, in the worst run. Bits: of the weights' files, over all parameters. "
        "Ratios: quantkit ÷ the tool; below 1 quantkit needs less. Quality on trained models, by "
        "`quality.py`: [QUALITY.md](QUALITY.md), a Llama, and "
        "[QUALITY-gpt-neox.md](QUALITY-gpt-neox.md).",
        "",
        f"{setting['date']} · {host['processor']}, {host['cores']} cores, "
        f"{host['memory_bytes'] / 2**30:.0f} GiB · {host['system']} · Python "
        f"{host['python']} · device {host['device']} · load at the start {host['load']}"
        + "".join(f" · {name}={value}" for name, value in host["variables"].items()),
        "",
        "| environment | versions |",
        "|---|---|",
        *(f"| {name} | {version} |" for name, version in setting["versions"].items()),
    ]
    for model, device in dict.fromkeys((run.model, run.device) for run in runs):
        on_model = [run for run in runs if (run.model, run.device) == (model, device)]
        size = on_model[0].parameters / 1e6
        lines += ["", f"## {model} ({size:,.1f} million parameters), {device}"]
        for job in JOBS:
            if on_job := [run for run in on_model if run.job == job]:
                lines += ["", f"### {TITLES[job]}", "", *table(job, on_job)]
    return "\n".join(lines) + "\n"


def table(job: str, runs: Sequence[Run]) -> list[str]:
    """The rows of one job on one model."""
    figures = {
        tool.name: Figures.of(found)
        for tool in JOBS[job]
        if (found := [run for run in runs if run.tool == tool.name])
    }
    own = [figures[tool.name] for tool in JOBS[job] if tool.is_ours and tool.name in figures]
    lines = [
        "| tool | runs | wall s | CPU s | peak GB | MB | bits | wall × | CPU × | peak × |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for tool in JOBS[job]:
        if tool.name not in figures:
            continue
        it = figures[tool.name]
        count = sum(run.tool == tool.name for run in runs)
        if it.error:
            lines.append(f"| {tool.name} | {count} | {it.error.replace('|', '/')} {'| ' * 8}")
            continue
        wall = f"{it.wall:.1f}" + (f" ({it.low:.1f}–{it.high:.1f})" if count > 1 else "")
        cells = [wall, f"{it.cpu:.1f}", f"{it.peak / 1e9:.2f}"]
        cells += [f"{it.weights / 1e6:,.1f}", f"{8 * it.weights / runs[0].parameters:.2f}"]
        if tool.is_ours:
            cells += [""] * 3
        else:
            cells += [ratios(own, it, what) for what in ("wall", "cpu", "peak")]
        lines.append(f"| {tool.name} | {count} | {' | '.join(cells)} |")
    present = [tool for tool in JOBS[job] if tool.name in figures]
    if len(own) > 1:
        lines += ["", f"Ratios: of {' / '.join(t.name for t in present if t.is_ours)}."]
    notes = [f"* {tool.name}: {tool.note}." for tool in present if tool.note]
    return [*lines, "", *notes] if notes else lines


def ratios(own: Sequence[Figures], theirs: Figures, what: str) -> str:
    """Ours over theirs, one for each of ours."""
    cells = ["–" if it.error else f"{getattr(it, what) / getattr(theirs, what):.2f}" for it in own]
    return " / ".join(cells)


def outcome(measured: processes.Measured) -> str:
    if measured.error:
        return measured.error
    return f"{measured.wall:.1f} s, {measured.peak / 1e9:.2f} GB"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
