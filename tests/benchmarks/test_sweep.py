"""The six recipes are written as they are compared, and weights are compared by their bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import sweep
from quantkit.recipes.recipe import load_recipe


@pytest.mark.parametrize("name", sweep.RECIPES)
def test_a_recipe_is_written_with_fewer_rows(name: str, tmp_path: Path) -> None:
    path = sweep.write_recipe(name, tmp_path, 5)
    loaded = load_recipe(str(path))
    shipped = load_recipe("gptq-w4-g128" if name == "gptq-w3" else name)
    assert path.stem == loaded.recipe.name == name
    if shipped.recipe.calibration is None:
        assert loaded.recipe.calibration is None
    else:
        assert loaded.recipe.calibration is not None and loaded.recipe.calibration.samples == 5
        assert loaded.calibration_dataset() == shipped.calibration_dataset()
    settings = loaded.recipe.quantize.model_dump()
    expected = shipped.recipe.quantize.model_dump()
    assert settings == ({**expected, "bits": 3} if name == "gptq-w3" else expected)


def test_only_weights_are_compared(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"same")
        (folder / "run.json").write_text(folder.name)
    assert sweep.weights(one) == sweep.weights(other)
    (other / "model.safetensors").write_bytes(b"diff")
    assert sweep.weights(one) != sweep.weights(other)
