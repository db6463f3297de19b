"""Every shipped recipe on the demo model, as recipes/README.md.

    python -m benchmarks.recipe_table [--out DIR] [--to FILE]

Quantizes the demo model by all of them with ``quantkit sweep``, judges the artifacts by the suite
``demo`` and writes the table, which takes minutes. Artifacts of the same inputs that DIR holds
already are used again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from quantkit.base import resources
from quantkit.base.errors import ExitCode
from quantkit.recipes.recipe import Recipe, shipped_recipes

SUITE = "demo"
# docs/artifacts.md has the versions that were tried, and what doesn't load.
ENGINES = {
    "awq": "vLLM; transformers with gptqmodel",
    "gptq": "vLLM; transformers with optimum and gptqmodel",
    "compressed-tensors": "vLLM; transformers with compressed-tensors",
    "bitsandbytes": "transformers with bitsandbytes",
    "gguf": "llama.cpp",
}
INTRODUCTION = """\
# Recipes

Written by `python -m benchmarks.recipe_table`; don't edit it. `quantkit recipes show NAME` prints a
recipe with every default, [docs/recipes.md](../docs/recipes.md) has every key, and
`quantkit recipes check` holds all of them to [recipes.lock](recipes.lock).

## On the demo model

Figures of the bundled demo model, {parameters:.1f} million parameters of which the embeddings are
{embeddings:.0%}, judged by suite {suite} ({rows} rows of {length} tokens, {cases} cases; the
baseline passes {passed}). They are from {libraries}. Bits per weight are those of the whole file:
embeddings stay in 16 bits in all formats but GGUF, so a larger model comes nearer to the recipe's
own number. KL divergence is the mean from BF16 in nats a token, with its 95% interval; BF16's own
rounding against float32 is {floor:.5f}.

A small model says how recipes rank, not what they cost on yours: judge those
(`quantkit sweep NAME … --model MODEL --suite SUITE --out DIR`).
"""
HEADERS = (
    *("recipe", "version", "digest", "method", "format", "loads in"),
    *("bits per weight ↓", "KL divergence ↓", "perplexity ratio ↓", "cases passed ↑", "verdict"),
)


def measure(out: Path) -> dict[str, Any]:
    """The comparison of all shipped recipes on the demo."""
    names = [loaded.recipe.name for loaded in shipped_recipes()]
    command = [sys.executable, "-m", "quantkit.cli", "sweep", *names, "--model", "demo"]
    command += ["--suite", SUITE, "--out", str(out), "--no-locate"]
    # A cache of its own: statistics that other code of the same version number left in the user's
    # cache may differ in the last digit.
    with tempfile.TemporaryDirectory() as cache:
        settings = os.environ | {"QUANTKIT_CACHE": cache}
        code = subprocess.run(command, stdout=subprocess.DEVNULL, env=settings).returncode
    if code not in (ExitCode.DONE, ExitCode.GATE_FAILED, ExitCode.INCONCLUSIVE):
        sys.exit(code)
    comparison: dict[str, Any] = json.loads((out / "comparison.json").read_text())
    return comparison


def row(recipe: Recipe, variant: dict[str, Any]) -> str:
    """One recipe and its variant of the comparison as a line of the table."""
    quality = variant["quality"]
    kl, cases = quality["kl_divergence"], quality["regression"]
    cells = (
        f"[{recipe.name}]({recipe.name}.yaml)",
        recipe.version,
        f"`{recipe.digest[:12]}`",
        recipe.quantize.method,
        recipe.quantize.format,
        ENGINES[recipe.quantize.format],
        f"{variant['bits_per_weight']:.3f}",
        f"{kl['mean']:.5f} ({kl['low']:.5f} to {kl['high']:.5f})",
        f"{quality['perplexity']['ratio']:.4f}",
        f"{cases['passed']}/{cases['total']}",
        variant["verdict"],
    )
    return "| " + " | ".join(cells) + " |"


def document(comparison: dict[str, Any], manifest: dict[str, Any]) -> str:
    """The whole README. ``manifest``: of any of the artifacts, for the versions of libraries."""
    baseline, (floor, *_) = comparison["baseline"], comparison["references"]
    config = json.loads((resources.demo_model() / "config.json").read_text())
    parameters = 8 * baseline["disk_bytes"] / baseline["bits_per_weight"]
    libraries = manifest["libraries"]
    introduction = INTRODUCTION.format(
        parameters=parameters / 1e6,
        embeddings=config["vocab_size"] * config["hidden_size"] / parameters,
        suite=comparison["suite"],
        rows=baseline["quality"]["rows"],
        length=baseline["quality"]["sequence_length"],
        cases=baseline["quality"]["regression"]["total"],
        passed=baseline["quality"]["regression"]["passed"],
        libraries=f"torch {libraries['torch']} and transformers {libraries['transformers']} on CPU",
        floor=floor["quality"]["kl_divergence"]["mean"],
    )
    lines = ["| " + " | ".join(HEADERS) + " |", "|" + "---|" * 6 + "---:|" * 4 + "---|"]
    variants = {variant["name"]: variant for variant in comparison["variants"]}
    recipes = [loaded.recipe for loaded in shipped_recipes()]
    lines += [row(recipe, variants[recipe.name]) for recipe in recipes]
    about = [f"- **{recipe.name}**: {recipe.description}" for recipe in recipes]
    return "\n".join([introduction, *lines, "", "## What each is for", "", *about]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("reports/recipes"))
    parser.add_argument("--to", type=Path, default=resources.recipes() / "README.md")
    options = parser.parse_args()
    comparison = measure(options.out)
    manifest = json.loads(next(options.out.glob("*/quantkit.json")).read_text())
    options.to.write_text(document(comparison, manifest), encoding="utf-8")
    print(options.to)


if __name__ == "__main__":
    main()
