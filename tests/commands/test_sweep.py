"""Many recipes on one model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.cli import refused, run


def test_a_sweep_makes_all_and_keeps_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    recipes = ("rtn-w4-g128", "gguf-q4-k-m", "gptq-w4-g128")
    command = ("sweep", *recipes, "--model", "demo", "--out", out, "--json")
    result = run(*command)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["name"] for row in rows] == list(recipes)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    again = run(*command)
    assert again.exit_code == 0 and "made already" in again.stderr
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == before
    assert "given twice" in refused(2, "sweep", "nf4", "nf4", "--model", "demo", "--out", out)

    listed = json.loads(run("cache", "list", "--json").stdout)
    assert listed and all(entry["bytes"] > 0 for entry in listed)
    assert json.loads(run("cache", "clear", "--json").stdout)["freed_bytes"] > 0
    assert json.loads(run("cache", "list", "--json").stdout) == []
