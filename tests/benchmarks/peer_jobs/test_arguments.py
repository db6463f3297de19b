"""The command line of a peer's job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.peer_jobs.arguments import Arguments, parse


@pytest.fixture
def feed(tmp_path: Path) -> Path:
    (tmp_path / "rows.json").write_text(json.dumps([[1, 2], [3, 4]]))
    return tmp_path


def parsed(monkeypatch: pytest.MonkeyPatch, feed: Path, job: str, *more: str) -> Arguments:
    monkeypatch.setattr("sys.argv", ["job", job, "--feed", str(feed), "--out", "/out", *more])
    return parse()


def test_everything_is_found_in_the_feed(monkeypatch: pytest.MonkeyPatch, feed: Path) -> None:
    given = parsed(monkeypatch, feed, "gptq", "--device", "cuda")
    assert (given.model, given.adapter) == (str(feed / "model"), str(feed / "adapter"))
    assert given.rows == [[1, 2], [3, 4]] and given.text == feed / "text.txt"
    assert (given.bits, given.device, given.mix) == (4, "cuda", "Q4_K_M")


@pytest.mark.parametrize(
    ("job", "flags", "symmetric"),
    [
        ("gptq", [], True),
        ("awq", [], False),
        ("gptq", ["--no-symmetric"], False),
        ("awq", ["--symmetric"], True),
    ],
)
def test_awq_is_asymmetric_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, feed: Path, job: str, flags: list[str], symmetric: bool
) -> None:
    assert parsed(monkeypatch, feed, job, *flags).symmetric is symmetric
