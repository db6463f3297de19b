"""Cases can be run, figures are compared, and the table tells what agrees."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import environments, foreign, processes
from benchmarks.environments import ENVIRONMENTS
from benchmarks.foreign import CASES, JOBS, Case, Row
from quantkit.methods.inputs import round_int8

# Their variant is a number or the name of a mix.
WITHOUT_VARIANTS = ("auto_awq", "llama_cpp")
ROW = Row("peer-w4", "gptq (v1)", "int4 g128 sym", (5.0, 5.0), (0.001, 0.001))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_can_be_run(case: Case) -> None:
    steps = [(case.environment, case.script)]
    for environment, script in [*steps, case.reader] if case.reader else steps:
        assert environment is None or environment in ENVIRONMENTS
        assert (JOBS / f"{script}.py").is_file()
    if case.script not in WITHOUT_VARIANTS:
        assert f'"{case.variant}"' in (JOBS / f"{case.script}.py").read_text()


def test_cases_have_names_of_their_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize(
    ("row", "agrees"),
    [
        (ROW, True),
        (replace(ROW, perplexity=(5.05, 5.0)), True),
        (replace(ROW, perplexity=(5.06, 5.0)), False),
        (replace(ROW, kl=(0.00098, 0.001)), False),
        (replace(ROW, kl=(float("nan"), 0.001)), False),
    ],
)
def test_figures_agree_to_one_percent(row: Row, agrees: bool) -> None:
    assert row.agrees == agrees
    verdict = "yes" if agrees else "**no**"
    assert foreign.table([row], {}).splitlines()[-1].endswith(f"| {verdict} |")


def test_failures_are_in_the_table() -> None:
    lines = foreign.table([ROW], {"peer-w3": "ValueError: no"}).splitlines()
    assert lines[-1] == "| peer-w3 | failed: ValueError: no | | | | | | |"
    assert lines[-2] == (
        "| peer-w4 | gptq (v1) | int4 g128 sym | 5.0000 | 5.0000 | 0.001000 | 0.001000 | yes |"
    )


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The peers' commands, none of which runs; scripts called "broken" fail."""
    calls: list[list[str]] = []

    def run(command: list[str], log: Path, *, settings: dict[str, str]) -> processes.Measured:
        calls.append(command)
        error = "ValueError: no" if "broken" in command[1] else None
        return processes.Measured(1.0, 1.0, 1, error)

    monkeypatch.setattr(processes, "run", run)
    monkeypatch.setattr(environments, "make", lambda name, directory: None)
    return calls


def test_a_reader_of_another_environment_comes_second(
    commands: list[list[str]], tmp_path: Path
) -> None:
    case = Case("llama.cpp", "llama_cpp", "Q4_K_M", (None, "gguf_weights"))
    for _ in range(2):
        assert foreign.make(case, tmp_path / "feed", tmp_path, tmp_path / "environments") is None
    assert len(commands) == 2  # it is made once
    out = tmp_path / "llama.cpp-Q4_K_M"
    rest = ["Q4_K_M", "--feed", str(tmp_path / "feed"), "--out", str(out)]
    python = environments.python_of("llama.cpp", tmp_path / "environments")
    assert commands[0] == [str(python), str(JOBS / "llama_cpp.py"), *rest]
    assert commands[1] == [sys.executable, str(JOBS / "gguf_weights.py"), *rest]


def test_a_case_that_failed_is_made_again(commands: list[list[str]], tmp_path: Path) -> None:
    case = Case(None, "broken", "fp4", (None, "gguf_weights"))
    for _ in range(2):
        assert foreign.make(case, tmp_path, tmp_path, tmp_path) == "ValueError: no"
    assert len(commands) == 2


def test_a_peer_that_is_missing_has_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, directory: Path) -> None:
        raise environments.EnvironmentFailed(f"no distribution for {name}")

    monkeypatch.setattr(environments, "make", refuse)
    assert foreign.make(CASES[0], tmp_path, tmp_path, tmp_path) == "no distribution for autoawq"


def test_int8_is_rounded_as_the_maker_does_only_while_it_is_asked_for() -> None:
    from quantkit.formats import compressed_tensors

    x = torch.tensor([[0.1, 1.0, 0.5]])
    with foreign.rounding_as_compressed_tensors():
        theirs = vars(compressed_tensors)["round_int8"](x)
    assert vars(compressed_tensors)["round_int8"] is round_int8
    assert (theirs * 127.5)[0, [0, 2]].tolist() == pytest.approx([13, 64])
    assert (round_int8(x) * 127)[0].tolist() == pytest.approx([13, 127, 64], abs=1e-4)
    x[0, 1] = -1.0
    fixed = foreign.round_as_compressed_tensors(x, torch.tensor(0.5))
    assert fixed.tolist() == [[0.0, -1.0, 0.5]]


def test_an_unknown_name_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["foreign", "exllama-w4"])
    with pytest.raises(SystemExit):
        foreign.main()
    assert "there is no case exllama-w4; there are autoawq-g128," in capsys.readouterr().err


def test_peers_read_a_tokenizer_of_before_transformers_5(tmp_path: Path) -> None:
    folder = foreign.feed(tmp_path)
    settings = json.loads((folder / "model" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    rows = json.loads((folder / "rows.json").read_text())
    assert {len(row) for row in rows} == {foreign.SEQUENCE_LENGTH}
    assert len(rows) == foreign.SAMPLES
    before = (folder / "rows.json").stat().st_mtime_ns
    assert foreign.feed(tmp_path) == folder
    assert (folder / "rows.json").stat().st_mtime_ns == before
