"""The command line of a peer's job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.foreign_jobs.arguments import parse


def test_everything_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("rows", "heldout"):
        (tmp_path / f"{name}.json").write_text(json.dumps([[len(name)]]))
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["job", "v1-sym", "--feed", str(tmp_path), "--out", str(out)])
    job = parse()
    assert (job.variant, job.model) == ("v1-sym", tmp_path / "model")
    assert (job.rows, job.heldout) == ([[4]], [[7]])
    assert (job.artifact, job.weights, job.figures) == (
        out / "artifact",
        out / "weights",
        out / "figures.json",
    )
