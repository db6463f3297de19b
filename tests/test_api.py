"""The Python API: light to import, and each function on the demo model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import quantkit
from quantkit.base.progress import Task
from quantkit.base.resources import demo_model, recipes
from quantkit.results.verdict import Verdict
from tests.helpers.present import present
from tests.helpers.suite import write_suite

HEAVY = {"torch", "transformers", "numpy", "pydantic", "yaml", "rich", "typer"}
CASES = [{"id": "cat", "prompt": "Everyone knows that the cat is", "check": {"contains": "black"}}]
GATES = [{"metric": "kl_divergence.mean", "max": 1.0}]
SHORT = quantkit.Load(prompt_tokens=4, new_tokens=2, repeats=1, threads=1)


class Watcher:
    """Progress that remembers what it was told."""

    def __init__(self) -> None:
        self.labels: list[str] = []
        self.notes: list[str] = []

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        self.labels.append(label)
        yield self

    def advance(self, steps: int = 1, *, doing: str | None = None) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo by round-to-nearest."""
    out = tmp_path_factory.mktemp("api") / "rtn"
    quantkit.quantize("rtn-w4-g128", model="demo", out=out)
    return out


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_suite(tmp_path_factory.mktemp("suite"), CASES, gates=GATES)


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, quantkit; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "quantkit.api" in loaded and not loaded & HEAVY


def test_everything_in_it_is_documented() -> None:
    for name in quantkit.__all__:
        assert getattr(quantkit, name).__doc__, name


def test_quantize_returns_the_manifest(tmp_path: Path) -> None:
    watcher = Watcher()
    out = str(tmp_path / "out")
    manifest = quantkit.quantize("rtn-w4-g128", model=demo_model(), out=out, progress=watcher)
    assert manifest.to_json() == json.loads((tmp_path / "out" / "quantkit.json").read_text())
    assert watcher.labels == ["quantize (rtn)"]
    with pytest.raises(quantkit.InputError, match="exists already"):
        quantkit.quantize("rtn-w4-g128", model="demo", out=out)
    quantkit.quantize("rtn-w4-g128", model="demo", out=out, force=True)


def test_a_recipe_is_a_name_a_path_or_loaded() -> None:
    loaded = quantkit.load_recipe("rtn-w4-g128", ["quantize.bits=8", "quantize.format=gptq"])
    assert loaded.recipe.name == "rtn-w4-g128+set"
    plans = [
        quantkit.dry_run(recipe, model="demo")
        for recipe in ("rtn-w4-g128", recipes() / "rtn-w4-g128.yaml", loaded)
    ]
    assert plans[0].nbytes == plans[1].nbytes < plans[2].nbytes


@pytest.mark.parametrize("adapters", [["demo"], [("demo", 0.5)]])
def test_adapters_may_have_weights(tmp_path: Path, adapters: list[Any]) -> None:
    manifest = quantkit.quantize(
        "rtn-w4-g128", model="demo", out=tmp_path / "out", adapters=adapters
    )
    assert len(manifest.adapters) == 1
    merged = quantkit.merge("demo", adapters, out=tmp_path / "merged", proof=False)
    assert merged.adapters == manifest.adapters
    assert merged.adapters[0].weight == (1.0 if adapters == ["demo"] else 0.5)


def test_evaluate_and_compare_decide(artifact: Path, suite: Path, tmp_path: Path) -> None:
    watcher = Watcher()
    judged = quantkit.evaluate(
        artifact, baseline="demo", suite=suite, out=tmp_path / "judged.json", progress=watcher
    )
    assert judged.verdict is Verdict.PASS and "judge rtn-w4-g128" in watcher.labels
    assert json.loads((tmp_path / "judged.json").read_text())["verdict"] == "PASS"
    out = tmp_path / "report"
    compared = quantkit.compare(
        [artifact],
        baseline="demo",
        suite=quantkit.load_suite(suite),
        out=out,
        load=SHORT,
        goal="a test",
        progress=watcher,
    )
    assert compared.goal == "a test" and (out / "report.html").is_file()
    (row,) = compared.variants
    assert row.quality == judged.variants[0].quality
    assert present(row.cost).new_tokens == SHORT.new_tokens
    assert any(note.startswith(f"written in {out}: comparison.json") for note in watcher.notes)


def test_bench_returns_rows_with_costs(artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "costs.json"
    rows = quantkit.bench([artifact], load=SHORT, out=out)
    assert [present(row.cost).engine for row in rows] == ["quantkit-int4"]
    assert json.loads(out.read_text()) == [row.to_json() for row in rows]


def test_sweep_makes_and_judges(suite: Path, tmp_path: Path) -> None:
    names = ["rtn-w4-g128", "fp8"]
    made = quantkit.sweep(names, model="demo", out=tmp_path)
    assert [row.name for row in made.variants] == names and made.comparison is None
    watcher = Watcher()
    judged = quantkit.sweep(names, model="demo", out=tmp_path, suite=suite, progress=watcher)
    assert sum("made already" in note for note in watcher.notes) == 2
    assert present(judged.comparison).verdict is Verdict.PASS
    assert (tmp_path / "comparison.json").is_file()


def test_inspect_and_verify_look(artifact: Path) -> None:
    assert quantkit.inspect(str(artifact)).method == "rtn"
    assert quantkit.verify(artifact, baseline="demo").passed


def test_errors_have_one_parent() -> None:
    assert issubclass(quantkit.InputError, quantkit.QuantkitError)
    assert issubclass(quantkit.MachineError, quantkit.QuantkitError)
    with pytest.raises(quantkit.InputError) as caught:
        quantkit.quantize("nf4", model="./nowhere", out="out")
    assert caught.value.where == "./nowhere" and caught.value.fix
