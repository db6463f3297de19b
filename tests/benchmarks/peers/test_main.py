"""The command line of the benchmark of peers: what is chosen, and what is written when."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from benchmarks.peers import __main__ as command
from benchmarks.peers.runs import Options, Run
from tests.helpers.peer_runs import options_of, run_of


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["peers", *arguments])
    command.main()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Options, list[Run]]]:
    """What ``bench`` was called with; it runs nothing."""
    calls: list[tuple[Options, list[Run]]] = []

    def bench(options: Options, kept: Sequence[Run]) -> Iterator[Run]:
        calls.append((options, list(kept)))
        yield run_of("quantkit", number=1)

    monkeypatch.setattr(command, "bench", bench)
    monkeypatch.setattr(command, "describe_setting", lambda options: {"date": "today"})
    monkeypatch.setattr(command, "render", lambda setting, runs: f"{len(runs)} runs")
    return calls


def test_the_list_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asked: list[object]
) -> None:
    call(monkeypatch, "--list")
    shown = capsys.readouterr().out
    assert "nf4: NF4 with double quantization\n    quantkit; transformers + bits" in shown
    assert not asked


@pytest.mark.parametrize("choice", [("--peers", "LlamaFactory"), ("--jobs", "q5")])
def test_a_name_that_is_unknown_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], choice: tuple[str, str]
) -> None:
    with pytest.raises(SystemExit):
        call(monkeypatch, *choice)
    assert choice[1] in capsys.readouterr().err


def test_only_a_resumed_benchmark_keeps_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: list[tuple[Options, list[Run]]]
) -> None:
    options = options_of(tmp_path)
    command.report(options, [run_of("quantkit")])
    place = ("--out", str(options.out), "--work", str(tmp_path), "--device", "cpu")
    call(monkeypatch, "--resume", *place)
    call(monkeypatch, *place)
    assert [kept for _, kept in asked] == [[run_of("quantkit")], []]
    assert asked[0][0].work.is_absolute() and asked[0][0].device == "cpu"


def test_results_are_written_after_every_run(
    tmp_path: Path, asked: list[tuple[Options, list[Run]]]
) -> None:
    options = options_of(tmp_path)

    def runs() -> Iterator[Run]:
        yield run_of("quantkit")
        assert options.out.read_text() == "1 runs"
        yield run_of("quantkit", number=1)

    command.report(options, runs())
    assert options.out.read_text() == "2 runs"
    record = json.loads(options.out.with_suffix(".json").read_text())
    assert record["date"] == "today" and [run["number"] for run in record["runs"]] == [0, 1]
