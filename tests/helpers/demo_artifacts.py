"""Artifacts of the demo model by the shipped recipes."""

from __future__ import annotations

from pathlib import Path

from quantkit.base.progress import Silent
from quantkit.commands.quantize import prepare, quantize
from quantkit.recipes.recipe import load_recipe
from quantkit.results.manifest import QuantizedManifest

SHIPPED = [
    *("awq-w4-g128", "gptq-w4-g128", "nf4", "gguf-q4-k-m", "gguf-q8-0", "rtn-w4-g128"),
    *("gguf-q4-k-m-gptq", "ct-w4a16-g128", "ct-awq-w4a16-g128", "int8-w8a8", "fp8"),
]


IN_SAFETENSORS = [
    *("awq-w4-g128", "gptq-w4-g128", "rtn-w4-g128"),
    *("ct-w4a16-g128", "ct-awq-w4a16-g128", "int8-w8a8", "fp8"),
]


TWO_BITS = ["quantize.bits=2", "quantize.format=gptq"]


def make(
    recipe: str, out: Path, settings: list[str] | None = None, model: str = "demo"
) -> QuantizedManifest:
    """The demo, or another ``model``, by a recipe, at ``out``; returns the manifest."""
    job = prepare(load_recipe(recipe, settings), model)
    # Without the cache, or the second of two runs would not calibrate.
    return quantize(job, out, device="cpu", force=False, progress=Silent(), cache=False)
