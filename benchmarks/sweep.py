"""Six recipes from one calibration, against the same six run separately.

    python benchmarks/sweep.py --model DIR [--samples N]

Both ways make the same artifacts (their bytes are compared); wall times of whole processes.
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
    """Seconds that one command takes."""
    started = time.monotonic()
    command = [sys.executable, "-m", "quantkit.cli", *map(str, arguments)]
    environment = {**os.environ, "QUANTKIT_CACHE": str(cache)}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.monotonic() - started


def weights(directory: Path) -> dict[str, str]:
    files = [path for path in directory.iterdir() if path.suffix in (".safetensors", ".gguf")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def three_bits(folder: Path, samples: int) -> Path:
    """The shipped GPTQ recipe at 3 bits, as a file of its own."""
    loaded = load_recipe("gptq-w4-g128")
    content = loaded.recipe.model_dump(mode="json", by_alias=True)
    content["name"] = "gptq-w3"
    content["quantize"]["bits"] = 3
    content["calibration"]["dataset"] = str(loaded.calibration_dataset())
    content["calibration"]["samples"] = samples
    path = folder / "gptq-w3.yaml"
    path.write_text(json.dumps(content))  # JSON is YAML
    return path


def with_samples(recipe: str, folder: Path, samples: int) -> Path:
    """A shipped recipe on fewer calibration rows, as a file of its own."""
    if recipe == "gptq-w3":
        return three_bits(folder, samples)
    loaded = load_recipe(recipe)
    content = loaded.recipe.model_dump(mode="json", by_alias=True)
    if content["calibration"] is not None:
        content["calibration"]["dataset"] = str(loaded.calibration_dataset())
        content["calibration"]["samples"] = samples
    path = folder / f"{recipe}.yaml"
    path.write_text(json.dumps(content))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--samples", type=int, default=16)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipes = [with_samples(recipe, folder, options.samples) for recipe in RECIPES]
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
