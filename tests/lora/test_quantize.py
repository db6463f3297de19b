"""Adapters folded in while quantizing: the bytes of merge then quantize, and the skill kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from quantkit.base.progress import Silent
from quantkit.base.resources import demo_adapter, demo_model
from quantkit.checkpoint.reader import Checkpoint
from quantkit.cli import app
from quantkit.commands.merge import merge
from quantkit.commands.quantize import prepare, quantize
from quantkit.formats.packed import open_artifact
from quantkit.judging.quality import judge_quality
from quantkit.judging.variants import build_comparison
from quantkit.lora.open import adapt
from quantkit.recipes.recipe import load_recipe
from quantkit.recipes.suite import load_suite
from quantkit.results.quality import Quality
from tests.helpers.present import present

DEMO = [("demo", 1.0)]
FEW = ["calibration.samples=8"]


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with its adapter merged, named as the demo is."""
    out = tmp_path_factory.mktemp("merged") / "demo"
    merge("demo", DEMO, out, progress=Silent())
    return out


def make(
    recipe: str,
    out: Path,
    model: str,
    adapters: list[tuple[str, float]],
    settings: list[str] | None = None,
) -> Path:
    job = prepare(load_recipe(recipe, settings), model, adapters)
    quantize(job, out, device="cpu", force=False, progress=Silent())
    return out


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [("awq-w4-g128", FEW), ("gptq-w4-g128", FEW), ("nf4", []), ("gguf-q4-k-m", FEW)],
)
def test_folding_in_gives_the_weights_of_merge_then_quantize(
    merged: Path, tmp_path: Path, recipe: str, settings: list[str]
) -> None:
    folded = make(recipe, tmp_path / "folded", "demo", DEMO, settings)
    after = make(recipe, tmp_path / "after", str(merged), [], settings)
    (mine,) = [*folded.glob("*.safetensors"), *folded.glob("*.gguf")]
    (theirs,) = [*after.glob("*.safetensors"), *after.glob("*.gguf")]
    assert mine.read_bytes() == theirs.read_bytes()


def test_the_manifest_names_the_adapter(tmp_path: Path) -> None:
    manifest = json.loads((make("nf4", tmp_path / "a", "demo", DEMO) / "quantkit.json").read_text())
    (adapter,) = manifest["adapters"]
    assert adapter["rank"] == 8 and "adapter_model.safetensors" in adapter["files"]
    plain = json.loads((make("nf4", tmp_path / "b", "demo", []) / "quantkit.json").read_text())
    assert plain["adapters"] == []


def test_a_weight_of_zero_is_the_base(tmp_path: Path) -> None:
    one = open_artifact(make("rtn-w4-g128", tmp_path / "a", "demo", [("demo", 0.0)]))
    other = open_artifact(make("rtn-w4-g128", tmp_path / "b", "demo", []))
    assert all(torch.equal(one.read(key), other.read(key)) for key in list(one.keys()))


def test_the_skill_is_the_adapters_and_survives_four_bits(tmp_path: Path) -> None:
    artifact = make("gptq-w4-g128", tmp_path / "gptq-w4-g128", "demo", DEMO)
    suite = load_suite("demo-adapter")
    baseline = adapt(Checkpoint(demo_model()), DEMO, "demo")
    qualities = judge_quality([artifact], baseline, suite, device="cpu", progress=Silent())
    comparison = build_comparison(baseline, [artifact], suite, qualities, None)
    assert [model.name for model in comparison.models] == [
        "BF16 + adapter",
        "BF16 vs FP32",
        "BF16 base",
        "gptq-w4-g128",
    ]

    def skill(quality: Quality) -> float:
        cases = [case for case in present(quality.regression).cases if "adapter" in case.tags]
        assert len(cases) >= 30
        return sum(case.passed for case in cases) / len(cases)

    assert skill(qualities.baseline) >= 0.95
    assert qualities.base is not None and skill(qualities.base) <= 0.1
    assert skill(qualities.artifacts[0]) >= 0.9
    assert comparison.verdict == "PASS"


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2 and "Traceback" not in result.output
    return " ".join(result.stderr.split())


def test_mistakes_with_adapters(tmp_path: Path) -> None:
    base = ("quantize", "nf4", "--model", "demo", "--out", tmp_path / "out", "--adapter")
    assert "no such directory" in refused(*base, "./nowhere")
    assert "isn't a number" in refused(*base, "demo=much")
    folder = tmp_path / "empty"
    folder.mkdir()
    assert "adapter_config.json" in refused(*base, folder)
    config = json.loads((demo_adapter() / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    assert "IA3" in refused(*base, folder)
    assert not (tmp_path / "out").exists()
