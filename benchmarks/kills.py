"""Do runs that are killed at random moments and then resumed end in the same bytes?

    python -m benchmarks.kills [--kills N] [--model DIR] [--recipes RECIPE...]

Makes an artifact by each recipe without interruption, and times it. Then starts the same commands
again and ends them with SIGKILL at random moments, N times in all, resuming after each kill. Every
artifact must then equal the uninterrupted one byte for byte, with nothing else left beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESUMED = "continuing after"  # in the note of a run that found finished steps
RECIPES = ["awq-w4-g128", "gptq-w4-g128", "gguf-q4-k-m"]


def digests(directory: Path) -> dict[str, str]:
    """sha256 of every file but run.json, which holds times and paths of the run."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "run.json"
    }


def command(recipe: str, model: str, out: Path, samples: int) -> list[str]:
    """The command line that makes an artifact."""
    start = [sys.executable, "-m", "quantkit.cli", "quantize", recipe, "--model", model]
    return [*start, "--out", str(out), "--no-cache", "--set", f"calibration.samples={samples}"]


def begin(line: list[str], out: Path) -> subprocess.Popen[bytes]:
    """Start a command; returns when it has begun to work, after all its imports.

    A kill during the imports would test nothing.
    """
    process = subprocess.Popen(line, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    partial = out.with_name(out.name + ".partial")
    while not partial.exists() and process.poll() is None:
        time.sleep(0.005)
    return process


def kill_at_random(line: list[str], out: Path, seconds: float, chance: random.Random) -> int:
    """Start a command one to three times, each ended by SIGKILL within its usual ``seconds``.

    Returns the number of kills, fewer where the command ended before its moment came.
    """
    kills = 0
    for _ in range(chance.randint(1, 3)):  # so that some are killed more than once
        process = begin(line, out)
        try:
            process.wait(timeout=chance.random() * seconds)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    return kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    failed = killed = resumed = 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        whole, seconds = {}, {}
        for recipe in options.recipes:
            line = command(recipe, options.model, work / recipe, options.samples)
            process = begin(line, work / recipe)
            started = time.monotonic()
            if process.wait():
                sys.exit(f"{recipe} failed")
            seconds[recipe] = time.monotonic() - started
            whole[recipe] = digests(work / recipe)
            shutil.rmtree(work / recipe)
        while killed < options.kills:
            recipe = options.recipes[killed % len(options.recipes)]
            out = work / "again" / "out"
            out.parent.mkdir(exist_ok=True)
            line = command(recipe, options.model, out, options.samples)
            killed += kill_at_random(line, out, seconds[recipe], chance)
            if not out.exists():
                last = subprocess.run(line, check=False, capture_output=True, text=True)
                resumed += RESUMED in last.stderr
            beside = sorted(path.name for path in out.parent.iterdir())
            good = out.exists() and digests(out) == whole[recipe] and beside == ["out"]
            failed += not good
            print(f"{recipe}: {killed} kills so far, {'same bytes' if good else 'DIFFERS'}")
            shutil.rmtree(out.parent)
    print(f"{killed} kills, {resumed} runs resumed from finished steps, {failed} failures")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
