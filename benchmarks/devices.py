"""Whether a GPU and the CPU make artifacts that are equally good, and a GPU the same ones twice.

    python -m benchmarks.devices [--recipes gptq-w4-g128 …] [--devices cuda cpu] [--out DEVICES.md]

Every device makes every recipe's artifact, the first device twice, and every device judges all of
them on held-out text. The table has the KL divergence against BF16 of each, with its interval, and
whether the two runs wrote the same bytes. ``--parts`` processes share the recipes of each device,
all at the same time. Recipes whose packages aren't installed are named and left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.printing import say

ROOT = Path(__file__).resolve().parent.parent
RECIPES = [path.stem for path in sorted((ROOT / "recipes").glob("*.yaml"))]
WEIGHTS = (".safetensors", ".gguf")
HELD_OUT = ROOT / "recipes" / "suites" / "demo-heldout.jsonl"


@dataclass(frozen=True)
class Judged:
    """KL divergence of an artifact: its mean, and the ends of its interval."""

    mean: float
    low: float
    high: float

    def holds(self, other: Judged) -> bool:
        return self.low <= other.mean <= self.high


def make(model: str, recipes: Sequence[str], device: str, folder: Path) -> None:
    """Make every recipe's artifact in ``folder``; ``RECIPE.failed`` there says why not."""
    import quantkit

    for recipe in recipes:
        begun = time.monotonic()
        try:
            out = folder / recipe
            quantkit.quantize(recipe, model=model, out=out, device=device, cache=False, force=True)
        except Exception as error:  # one recipe's failure is its row's
            why = f"{type(error).__name__}: {error}"
            (folder / f"{recipe}.failed").write_text(why)
            say(f"{folder.name} {recipe}: {why}")
        else:
            say(f"{folder.name} {recipe}: {time.monotonic() - begun:.1f} s")


def judge(model: str, artifacts: Sequence[Path], device: str, suite: Path, out: Path) -> None:
    """Write the KL divergence of every artifact to ``out``, by its folder and name."""
    import quantkit

    comparison = quantkit.evaluate(artifacts, baseline=model, suite=suite, device=device)
    figures = {}
    for path, row in zip(artifacts, comparison.variants, strict=True):
        assert row.quality is not None and row.quality.kl_divergence is not None
        interval = row.quality.kl_interval
        assert interval is not None
        mean = row.quality.kl_divergence.mean
        figures[f"{path.parent.name}/{path.name}"] = [mean, interval.low, interval.high]
    out.write_text(json.dumps(figures))


def together(commands: Sequence[Sequence[object]]) -> None:
    """Run all of them at the same time, each in a process. Raises SystemExit where one fails."""
    threads = max(1, (os.cpu_count() or 1) // len(commands))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    start = [sys.executable, "-m", "benchmarks.devices"]
    processes = [
        subprocess.Popen([*start, *map(str, command)], cwd=ROOT, env=environment)
        for command in commands
    ]
    codes = [process.wait() for process in processes]
    for command, code in zip(commands, codes, strict=True):
        if code:
            raise SystemExit(f"{' '.join(map(str, command))} ended with code {code}")


def digests(artifact: Path) -> dict[str, str]:
    """sha256 of the files with weights, by their name."""
    files = [path for path in artifact.iterdir() if path.suffix in WEIGHTS]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def table(devices: Sequence[str], work: Path, recipes: Sequence[str]) -> list[str]:
    """A row for each recipe."""
    judged: dict[str, dict[str, Judged]] = {}
    for device in devices:
        judged[device] = {
            name: Judged(*values)
            for path in work.glob(f"judged-{device}-*.json")
            for name, values in json.loads(path.read_text()).items()
        }
    pairs = [(made, by) for made in devices for by in devices]
    heads = " | ".join(f"made on {made}, judged on {by}" for made, by in pairs)
    lines = [
        f"| recipe | {heads} | within each other's intervals | {devices[0]} twice |",
        f"|---|{'--:|' * len(pairs)}---|---|",
    ]
    for recipe in recipes:
        cells = []
        found = []
        for made, by in pairs:
            it = judged[by].get(f"{made}-0/{recipe}")
            found.append(it)
            cells.append(f"{it.mean:.6f} ({it.low:.6f} to {it.high:.6f})" if it else "–")
        present = [it for it in found if it is not None]
        inside = all(one.holds(other) for one in present for other in present)
        verdict = ("yes" if inside else "NO") if len(present) == len(pairs) else "not made"
        folders = [work / f"{devices[0]}-{run}" / recipe for run in (0, 1)]
        twice = "not made"
        if all(folder.is_dir() for folder in folders):
            same = digests(folders[0]) == digests(folders[1])
            twice = "the same bytes" if same else "OTHER BYTES"
        lines.append(f"| {recipe} | {' | '.join(cells)} | {verdict} | {twice} |")
    return lines


def run(options: argparse.Namespace) -> list[str]:
    """Make and judge everything; returns the lines of the page."""
    work: Path = options.work.resolve()
    devices = list(dict.fromkeys(options.devices))
    folders = [(device, work / f"{device}-0") for device in devices]
    folders.append((devices[0], work / f"{devices[0]}-1"))
    shutil.rmtree(work, ignore_errors=True)
    for _, folder in folders:
        folder.mkdir(parents=True)
    parts = [options.recipes[part :: options.parts] for part in range(options.parts)]
    shares = [["--model", options.model, "--recipes", *part] for part in parts if part]
    begun = time.monotonic()
    together(
        [
            ["--make", folder, "--devices", device, *share]
            for device, folder in folders
            for share in shares
        ]
    )
    say(f"made in {time.monotonic() - begun:.0f} s")
    likelihood = {
        "dataset": str(options.text.resolve()),
        "sequence_length": options.sequence_length,
    }
    suite = work / "suite.yaml"
    document: dict[str, Any] = {"schema": 1, "name": "devices", "version": "1.0.0"}
    suite.write_text(json.dumps({**document, "likelihood": likelihood}))  # JSON is YAML
    begun = time.monotonic()
    together(
        [["--judge", work, "--devices", device, *share] for device in devices for share in shares]
    )
    say(f"judged in {time.monotonic() - begun:.0f} s")
    lines = [
        "# The same recipes on a GPU and on the CPU",
        "",
        f"{options.model}, KL divergence against BF16 on {options.text.name} with 95% intervals · "
        f"{machine.gpu() or 'no GPU'} · {machine.processor()} · quantkit {machine.commit()}",
        "",
        *table(devices, work, options.recipes),
    ]
    for path in sorted(work.glob("*/*.failed")):
        lines.append(f"* {path.parent.name}, {path.stem}: {path.read_text()}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--recipes", nargs="+", default=RECIPES, metavar="RECIPE")
    parser.add_argument("--devices", nargs="+", default=["cuda", "cpu"], metavar="DEVICE")
    parser.add_argument("--text", type=Path, default=HELD_OUT, help="held-out text, for judging")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("reports/devices"))
    parser.add_argument("--out", type=Path)
    # One step, in a process of its own.
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--judge", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = options.devices[0]
    if options.make:
        make(options.model, options.recipes, device, options.make)
    elif options.judge:
        work = options.judge
        made = [path.parent for path in sorted(work.glob("*-0/*/quantkit.json"))]
        artifacts = [path for path in made if path.name in options.recipes]
        out = work / f"judged-{device}-{options.recipes[0]}.json"
        if artifacts:
            judge(options.model, artifacts, device, work / "suite.yaml", out)
    else:
        page = "\n".join(run(options)) + "\n"
        print(page)
        if options.out:
            options.out.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
