"""The commands whose memory is measured."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import memory
from benchmarks.memory import CASES, Case
from benchmarks.models import SHAPES
from benchmarks.processes import Measured
from quantkit.recipes.recipe import load_recipe
from tests.helpers.cli import assert_parses


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_a_case_has_a_model_and_a_recipe_that_are_there(case: Case, tmp_path: Path) -> None:
    assert case.model in SHAPES
    (tmp_path / "rtn-w4-g128").mkdir()  # so that eval has nothing to make
    command = case.command(Path("/feed"), tmp_path)
    assert command[:3] == memory.QUANTKIT and command[command.index("--device") + 1] == "cpu"
    assert_parses(command)
    if command[3] == "quantize":
        load_recipe(command[4], [part for part in command if "=" in part])


def test_judging_makes_its_artifact_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: made.append(command))
    command = memory.evaluate(tmp_path / "feed", tmp_path)
    assert [line[3:5] for line in made] == [["quantize", "rtn-w4-g128"]]
    assert command[3:5] == ["eval", str(tmp_path / "rtn-w4-g128")]
    suite = json.loads((tmp_path / "suite.yaml").read_text())
    assert suite["likelihood"]["dataset"] == str(tmp_path / "feed" / "text.txt")


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["memory", *arguments])
    memory.main()


def test_an_unknown_case_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        call(monkeypatch, "gptq", "q5")
    assert "there is no case q5; there are gptq, gptq-deep," in capsys.readouterr().err


def test_a_failure_stands_in_the_row_of_its_case(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = {"1.1b": Measured(12.4, 20.6, 1_330_000_000, None)}
    failed = Measured(1.0, 1.0, 1, "OutOfMemoryError: too much")
    monkeypatch.setattr(memory, "measure", lambda case, work: results.get(case.model, failed))
    call(monkeypatch, "gptq", "nf4")
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "| 1.1b | quantize gptq-w4-g128, 16 × 512 tokens | 1.33 | 12 | 21 |",
        "| 7b | quantize nf4 | OutOfMemoryError: too much |",
    ]
    call(monkeypatch, "nf4", "--model", "1.1b")
    assert capsys.readouterr().out.splitlines()[-1] == "| 1.1b | quantize nf4 | 1.33 | 12 | 21 |"
