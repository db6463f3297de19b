"""Quality per bit of the shipped recipes on a model and texts of your choice.

    python benchmarks/quality.py --model DIR --calibration FILE --heldout FILE [--out DIR]

Quantizes MODEL by every recipe named (calibrated on the first ``--samples`` rows of the
calibration text where a recipe calibrates), judges all of them on the first ``--rows`` rows of
the held-out text, and prints the comparison. The README's table was made with WikiText-2's
validation split to calibrate and its test split to judge.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from quantkit.recipe import load_recipe

RECIPES = ["rtn-w4-g128", "awq-w4-g128", "gptq-w4-g128", "nf4", "gguf-q4-k-m", "gguf-q8-0"]


def quantkit(*arguments: object) -> str:
    """Run the command line; its stdout. Stops the benchmark when it fails."""
    command = [sys.executable, "-m", "quantkit.cli", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("reports/quality"))
    options = parser.parse_args()

    artifacts = []
    for recipe in options.recipes:
        settings = []
        if load_recipe(recipe).recipe.calibration is not None:
            settings = [
                f"calibration.dataset={options.calibration}",
                f"calibration.samples={options.samples}",
                f"calibration.sequence_length={options.sequence_length}",
            ]
        artifact = options.out / Path(recipe).stem
        flags = [part for setting in settings for part in ("--set", setting)]
        quantkit("quantize", recipe, "--model", options.model, "--out", artifact, "--force", *flags)
        artifacts.append(artifact)
    suite = options.out / "suite.yaml"
    likelihood = {
        "dataset": str(options.heldout.resolve()),
        "sequence_length": options.sequence_length,
        "rows": options.rows,
    }
    document = {"schema": 1, "name": "benchmark", "version": "1.0.0", "likelihood": likelihood}
    suite.write_text(json.dumps(document))  # JSON is YAML
    print(quantkit("eval", *artifacts, "--baseline", options.model, "--suite", suite))


if __name__ == "__main__":
    main()
