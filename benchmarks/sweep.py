"""Six recipes in one sweep, with one calibration, compared with six separate runs.

    python -m benchmarks.sweep --model DIR [--samples N]

Prints wall times of whole processes, and whether both ways made the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from quantkit.recipes.recipe import load_recipe

RECIPES = ["awq-w4-g128", "gptq-w4-g128", "gptq-w3", "rtn-w4-g128", "gguf-q4-k-m", "nf4"]


def run(*arguments: object, cache: Path) -> float:
    """Run one command of quantkit; returns the seconds that it took."""
    started = time.monotonic()
    command = [sys.executable, "-m", "quantkit.cli", *map(str, arguments)]
    environment = {**os.environ, "QUANTKIT_CACHE": str(cache)}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.monotonic() - started


def weights(directory: Path) -> dict[str, str]:
    """sha256 of the files with weights, by their name."""
    files = [path for path in directory.iterdir() if path.suffix in (".safetensors", ".gguf")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_recipe(name: str, folder: Path, samples: int) -> Path:
    """Write a recipe of RECIPES with ``samples`` calibration rows, as a file of its own."""
    three_bits = name == "gptq-w3"  # no shipped recipe has 3 bits
    loaded = load_recipe("gptq-w4-g128" if three_bits else name)
    content = loaded.recipe.model_dump(mode="json", by_alias=True)
    content["name"] = name
    if three_bits:
        content["quantize"]["bits"] = 3
    if content["calibration"] is not None:
        content["calibration"]["dataset"] = str(loaded.calibration_dataset())
        content["calibration"]["samples"] = samples
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(content))  # JSON is YAML
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--samples", type=int, default=16)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipes = [write_recipe(recipe, folder, options.samples) for recipe in RECIPES]
        model = ("--model", options.model)
        together = run("sweep", *recipes, *model, "--out", folder / "sweep", cache=folder / "c")
        total = 0.0
        for recipe in recipes:
            out = folder / "alone" / recipe.stem
            seconds = run(
                "quantize", recipe, *model, "--out", out, "--no-cache", cache=folder / "none"
            )
            same = weights(out) == weights(folder / "sweep" / recipe.stem)
            print(f"{recipe.stem}: {seconds:.1f} s, {'same bytes' if same else 'OTHER BYTES'}")
            total += seconds
        print(f"sweep {together:.1f} s, separately {total:.1f} s: {together / total:.2f}")


if __name__ == "__main__":
    main()
