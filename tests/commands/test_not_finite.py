"""A model that computes nothing finite is told from a quantization that went wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from quantkit.base.resources import demo_model
from tests.helpers.cli import run

RMS = "rms_norm_eps, dtype)"
RECIPES = ["rtn-w4-g128", "nf4", "awq-w4-g128", "gptq-w4-g128", "gguf-q4-k-m-corrected"]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps"])
def test_a_config_that_makes_nothing_finite(tmp_path: Path, recipe: str, key: str) -> None:
    model = Path(shutil.copytree(demo_model(), tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    if key == "rope_theta":
        config["rope_parameters"]["rope_theta"] = 0
    else:
        config["rms_norm_eps"] = -1e9
    (model / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    small = ("--set", "calibration.samples=2", "--set", "calibration.sequence_length=64")
    settings = small if recipe.startswith(("awq", "gptq", "gguf")) else ()
    done = run("quantize", recipe, "--model", str(model), "--out", str(out), *settings)
    assert done.exit_code == 2, done.stderr
    said = " ".join(done.stderr.split())
    assert "that aren't finite" in said and f"config.json right (rope_theta, {RMS}" in said
    assert not out.exists() and not out.with_name("out.partial").exists()
