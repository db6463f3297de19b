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

These figures don't tell what a recipe costs on your model: judge it there
(`quantkit sweep NAME … --model MODEL --suite SUITE --out DIR`).
"""
INDISTINCT = """\
Nor can the demo tell the corrected recipes from the plain ones: {pairs}.
The intervals overlap, and they are over the judged rows alone: other calibration rows move these
figures by as much again. With 48 rows of six seeds gptq-w4-g128-corrected comes to 0.00068 on
average, gptq-w4-g128 to 0.00070 ([docs/quality.md](../docs/quality.md#drifted-inputs)). The bundled
calibration text is unlike what the demo was trained on. Models of 20 million parameters, calibrated
and judged on text of one kind, can tell: there the corrected recipes are closer to BF16, by a
quarter to a half ([benchmarks/QUALITY.md](../benchmarks/QUALITY.md),
[benchmarks/QUALITY-gpt-neox.md](../benchmarks/QUALITY-gpt-neox.md)).
"""
_CORRECTED = "-corrected"
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


def interval(variant: dict[str, Any]) -> str:
    """A variant's mean KL divergence with its interval."""
    kl = variant["quality"]["kl_divergence"]
    return f"{kl['mean']:.5f} ({kl['low']:.5f} to {kl['high']:.5f})"


def corrected(variants: dict[str, dict[str, Any]]) -> str:
    """The paragraph about corrected recipes whose intervals overlap with the plain recipes'.

    Empty where the demo can tell them apart.
    """
    pairs = []
    for name, variant in variants.items():
        if not name.endswith(_CORRECTED):
            continue
        plain = name.removesuffix(_CORRECTED)
        # gguf-q4-k-m is ggml's own; the corrected recipe goes beyond gguf-q4-k-m-gptq.
        plain = f"{plain}-gptq" if f"{plain}-gptq" in variants else plain
        mine, theirs = (v["quality"]["kl_divergence"] for v in (variant, variants[plain]))
        if mine["low"] <= theirs["high"] and theirs["low"] <= mine["high"]:
            pairs.append(
                f"{name} has {interval(variant)} and {plain} has {interval(variants[plain])}"
            )
    return f"\n{INDISTINCT.format(pairs='; '.join(pairs))}" if pairs else ""


def row(recipe: Recipe, variant: dict[str, Any]) -> str:
    """One recipe and its variant of the comparison as a line of the table."""
    quality = variant["quality"]
    cases = quality["regression"]
    cells = (
        f"[{recipe.name}]({recipe.name}.yaml)",
        recipe.version,
        f"`{recipe.digest[:12]}`",
        recipe.quantize.method,
        recipe.quantize.format,
        ENGINES[recipe.quantize.format],
        f"{variant['bits_per_weight']:.3f}",
        interval(variant),
        f"{quality['perplexity']['ratio']:.4f}",
        f"{cases['passed']}/{cases['total']}",
        variant["verdict"],
    )
    return "| " + " | ".join(cells) + " |"


def document(comparison: dict[str, Any], manifest: dict[str, Any]) -> str:
    """The whole README. ``manifest``: of any of the artifacts, for the versions of libraries."""
    baseline, (floor, *_) = comparison["baseline"], comparison["references"]
    variants = {variant["name"]: variant for variant in comparison["variants"]}
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
    introduction += corrected(variants)
    lines = ["| " + " | ".join(HEADERS) + " |", "|" + "---|" * 6 + "---:|" * 4 + "---|"]
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
