"""Runs on the demo model that are stopped, and artifacts of those that aren't."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantkit.base.files import sha256
from quantkit.base.progress import Silent, Task
from quantkit.commands.quantize import prepare, quantize
from quantkit.recipes.recipe import load_recipe
from quantkit.results.manifest import QuantizedManifest

FEW = ["calibration.samples=16"]
PROPAGATING = {
    "quantized": ("gptq-w4-g128", [*FEW, "quantize.propagate=quantized"]),
    "corrected": ("gptq-w4-g128", [*FEW, "quantize.propagate=corrected"]),
    "corrected-gguf": ("gguf-q4-k-m-gptq", [*FEW, "quantize.propagate=corrected"]),
}


def make(recipe: str, out: Path, settings: list[str] = FEW, **options: Any) -> QuantizedManifest:
    job = prepare(load_recipe(recipe, settings), "demo")
    options = {"device": "cpu", "force": False, "progress": Silent(), "cache": False, **options}
    return quantize(job, out, **options)


class Whole:
    """Uninterrupted artifacts, by recipe or by a name of ``PROPAGATING``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __getitem__(self, name: str) -> Path:
        recipe, settings = PROPAGATING.get(name, (name, FEW))
        if not (self._folder / name).exists():
            make(recipe, self._folder / name, settings)
        return self._folder / name


def digests(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): sha256(path)
        for path in directory.rglob("*")
        if path.is_file() and path.name != "run.json"
    }


class Stopped(Exception):
    pass


class StopsAfter(Silent):
    """Progress that ends the run at the n-th step, as a crash would."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def advance(self, steps: int = 1, *, doing: str | None = None) -> None:
        self.left -= 1
        if self.left < 0:
            raise Stopped

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        yield self
