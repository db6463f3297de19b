"""Peak memory of quantkit's commands as models grow.

    python -m benchmarks.memory [CASE...] [--work reports/bench]

The 1.1-billion-parameter model and one of twice as many layers show whether depth costs memory; the
7-billion one shows what a model of common size needs. Each command is a process of its own. All
checkpoints take 23 GB of disk and are kept; artifacts take 5 GB and are deleted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import Measured, run

ROOT = Path(__file__).resolve().parent.parent
QUANTKIT = [sys.executable, "-m", "quantkit.cli"]


@dataclass(frozen=True)
class Case:
    """A model and the command on it, a function of the model's folder and of one to write into."""

    model: str
    title: str
    command: Callable[[Path, Path], list[str]]


def quantize(recipe: str, *settings: str) -> Callable[[Path, Path], list[str]]:
    """The command that quantizes a model by a shipped recipe."""
    flags = [part for setting in settings for part in ("--set", setting)]

    def command(feed: Path, out: Path) -> list[str]:
        place = ["--model", str(feed / "model"), "--out", str(out / recipe), "--force"]
        return [*QUANTKIT, "quantize", recipe, "--no-cache", *place, "--device", "cpu", *flags]

    return command


def evaluate(feed: Path, out: Path) -> list[str]:
    """The command that judges an artifact on 16 rows of 512 tokens.

    The artifact is made here, by a method that needs no calibration. Raises CalledProcessError when
    it can't be made.
    """
    artifact = out / "rtn-w4-g128"
    if not artifact.is_dir():
        subprocess.run(quantize("rtn-w4-g128")(feed, out), check=True)
    likelihood = {"dataset": str(feed / "text.txt"), "sequence_length": 512, "rows": 16}
    suite = out / "suite.yaml"
    document = {"schema": 1, "name": "memory", "version": "1.0.0", "likelihood": likelihood}
    suite.write_text(json.dumps(document))  # JSON is YAML
    baseline = ["--baseline", str(feed / "model"), "--suite", str(suite)]
    return [*QUANTKIT, "eval", str(artifact), *baseline, "--device", "cpu"]


SAMPLES = "calibration.samples=16"
GPTQ = quantize("gptq-w4-g128", SAMPLES)
CASES = {
    "gptq": Case("1.1b", "quantize gptq-w4-g128, 16 × 512 tokens", GPTQ),
    "gptq-deep": Case("1.1b-deep", "quantize gptq-w4-g128, 16 × 512 tokens", GPTQ),
    "eval": Case("1.1b", "eval of a 4-bit artifact, 16 × 512 tokens", evaluate),
    "q4_k_m": Case(
        "7b", "quantize gguf-q4-k-m, no calibration", quantize("gguf-q4-k-m", "calibration=null")
    ),
    "q4_k_m-imatrix": Case(
        "7b", "quantize gguf-q4-k-m, 16 × 512 tokens", quantize("gguf-q4-k-m", SAMPLES)
    ),
    "nf4": Case("7b", "quantize nf4", quantize("nf4")),
}


def measure(case: Case, work: Path) -> Measured:
    """Make the model if it isn't there and run the command on it."""
    command = [sys.executable, "-m", "benchmarks.models", case.model, "--work", str(work)]
    subprocess.run(command, check=True, cwd=ROOT)
    out = work / "memory"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    command = case.command(work / case.model, out)
    measured = run(command, work / "memory.log", settings={"HF_HUB_OFFLINE": "1"})
    shutil.rmtree(out)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--model", help="instead of every case's own, to try the script")
    parser.add_argument("--work", type=Path, default=Path("reports/bench"))
    options = parser.parse_args()
    names = options.cases or list(CASES)
    if unknown := set(names) - set(CASES):
        parser.error(f"there is no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    work = options.work.resolve()
    print(f"{os.cpu_count()} cores\n")
    print("| model | command | peak GB | wall s | CPU s |")
    print("|---|---|--:|--:|--:|", flush=True)
    for name in names:
        case = CASES[name]
        if options.model:
            case = Case(options.model, case.title, case.command)
        it = measure(case, work)
        cells = f"{it.peak / 1e9:.2f} | {it.wall:.0f} | {it.cpu:.0f}"
        print(f"| {case.model} | {case.title} | {it.error or cells} |", flush=True)


if __name__ == "__main__":
    main()
