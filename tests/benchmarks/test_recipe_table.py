"""recipes/README.md: one line for each recipe, with every figure of its artifact."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import recipe_table
from quantkit.recipes.recipe import load_recipe, shipped_recipes
from tests.helpers.cli import assert_parses


def variant(name: str) -> dict[str, Any]:
    """A variant of a comparison's JSON, as far as the table reads it."""
    return {
        "name": name,
        "bits_per_weight": 4.2503,
        "verdict": "PASS",
        "quality": {
            "kl_divergence": {"mean": 0.00123, "low": 0.0011, "high": 0.00135},
            "perplexity": {"ratio": 1.00234},
            "regression": {"passed": 76, "total": 77},
        },
    }


@pytest.fixture
def comparison() -> dict[str, Any]:
    quality = {"rows": 64, "sequence_length": 256, "regression": {"total": 77, "passed": 76}}
    return {
        "suite": "demo 1.0.0",
        "baseline": {"disk_bytes": 5_300_000, "bits_per_weight": 16.0, "quality": quality},
        "references": [{"quality": {"kl_divergence": {"mean": 0.00004}}}],
        "variants": [variant(loaded.recipe.name) for loaded in shipped_recipes()],
    }


def test_a_row_has_a_cell_for_every_header() -> None:
    recipe = load_recipe("awq-w4-g128").recipe
    row = recipe_table.row(recipe, variant("awq-w4-g128"))
    assert row.count("|") == len(recipe_table.HEADERS) + 1
    assert "| [awq-w4-g128](awq-w4-g128.yaml) |" in row and f"`{recipe.digest[:12]}`" in row
    assert "| 4.250 | 0.00123 (0.00110 to 0.00135) | 1.0023 | 76/77 | PASS |" in row


def test_every_recipe_has_a_row_and_a_purpose(comparison: dict[str, Any]) -> None:
    libraries = {"torch": "2.13.0", "transformers": "5.23.0"}
    page = recipe_table.document(comparison, {"libraries": libraries})
    for loaded in shipped_recipes():
        assert page.count(f"({loaded.recipe.name}.yaml)") == 1
        assert f"- **{loaded.recipe.name}**: {loaded.recipe.description}" in page
    assert "2.6 million parameters" in page and "suite demo 1.0.0 (64 rows of 256 tokens" in page
    assert "from torch 2.13.0 and transformers 5.23.0 on CPU" in page


def test_corrected_recipes_that_the_demo_can_not_tell_apart_are_named() -> None:
    plain, corrected = variant("x"), variant("x-corrected")
    paragraph = recipe_table.corrected({"x": plain, "x-corrected": corrected})
    assert "x-corrected has 0.00123 (0.00110 to 0.00135) and x has 0.00123" in paragraph
    assert "benchmarks/QUALITY.md" in paragraph
    corrected["quality"]["kl_divergence"] = {"mean": 0.0005, "low": 0.0004, "high": 0.0006}
    assert recipe_table.corrected({"x": plain, "x-corrected": corrected}) == ""


def test_a_recipe_that_was_not_judged_is_no_row(comparison: dict[str, Any]) -> None:
    comparison["variants"].pop()
    with pytest.raises(KeyError):
        recipe_table.document(comparison, {"libraries": {"torch": "", "transformers": ""}})


@pytest.mark.parametrize(("code", "ends"), [(0, False), (1, False), (4, False), (3, True)])
def test_a_failed_gate_is_a_result_and_a_failed_sweep_is_not(
    code: int, ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        assert_parses(command)
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(subprocess, "run", run)
    (tmp_path / "comparison.json").write_text('{"suite": "demo"}')
    if not ends:
        assert recipe_table.measure(tmp_path) == {"suite": "demo"}
        return
    with pytest.raises(SystemExit) as ended:
        recipe_table.measure(tmp_path)
    assert ended.value.code == code
