"""Contestants can be run, what they make is found and judged, and the tables hold all of it."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import environments, processes, quality
from benchmarks.environments import ENVIRONMENTS
from benchmarks.quality import CLASSES, PEER_JOBS, Contestant, Entry
from quantkit.recipes.recipe import load_recipe
from tests.helpers.cli import assert_parses

CONTESTANTS = [
    pytest.param(contestant, id=f"{title}, {contestant.name}")
    for title, contestants in CLASSES.items()
    for contestant in contestants()
]
MEASURED = processes.Measured(12.4, 20.0, 10**9, None)


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    for name in ("model", "out"):
        (tmp_path / name).mkdir()
    return argparse.Namespace(
        model=tmp_path / "model",
        calibration=tmp_path / "calibration.txt",
        heldout=tmp_path / "heldout.txt",
        llama_perplexity=False,
        samples=4,
        rows=8,
        sequence_length=64,
        environments=tmp_path / "environments",
        out=tmp_path / "out",
    )


def variant(kl: float) -> dict[str, Any]:
    """A variant of a comparison's JSON, as far as the table reads it."""
    return {
        "bits_per_weight": 4.25,
        "quality": {
            "kl_divergence": {"mean": kl, "low": 0.9 * kl, "high": 1.2 * kl, "p99": 5 * kl},
            "top1_agreement": 0.987,
            "perplexity": {"value": 12.3456},
        },
    }


@pytest.mark.parametrize("contestant", CONTESTANTS)
def test_a_contestant_can_be_run(contestant: Contestant, options: argparse.Namespace) -> None:
    command = contestant.command(options, Path("/feed"), Path("/out"))
    if contestant.recipe:
        assert command[:4] == [*quality.QUANTKIT, "quantize"] and "--no-cache" in command
        assert_parses(command)
        load_recipe(contestant.recipe, list(contestant.settings))
        return
    assert Path(command[1]).parent == PEER_JOBS and Path(command[1]).is_file()
    assert command[-4:] == ["--feed", "/feed", "--out", "/out"]
    if contestant.environment is None:
        assert command[0] == sys.executable
    else:
        assert contestant.environment in ENVIRONMENTS
        assert str(options.environments / contestant.environment) in command[0]


def test_contestants_of_a_class_have_names_of_their_own_and_a_peer() -> None:
    for title, contestants in CLASSES.items():
        names = [contestant.name for contestant in contestants()]
        assert len(set(names)) == len(names), title
        assert any(not contestant.recipe for contestant in contestants()), title


def test_the_same_grid_for_everyone() -> None:
    ours, *_, peer = quality.integers(3, symmetric=False)
    assert {"quantize.bits=3", "quantize.symmetric=false"} <= set(ours.settings)
    assert peer.job[1:] == ("gptq", "--bits", "3", "--no-symmetric")
    [_, _, ggml, theirs] = quality.mix("q3_k_m")
    assert ggml.settings == ("quantize.mix=q3_k_m",) and theirs.job[-1] == "Q3_K_M"


def test_an_artifact_is_made_once(
    options: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], log: Path, *, settings: dict[str, str]) -> processes.Measured:
        commands.append(command)
        return MEASURED

    monkeypatch.setattr(processes, "run", run)
    calibrated = quality.ours("q", "gptq-w4-g128")
    out = options.out / "artifacts" / "q"
    for _ in range(2):
        assert quality.make(calibrated, options, tmp_path, out) == MEASURED
    assert len(commands) == 1 and f"calibration.dataset={options.calibration}" in commands[0]
    quality.make(quality.ours("plain", "nf4"), options, tmp_path, options.out / "nf4")
    assert not any("calibration." in part for part in commands[1])


def test_a_peer_that_is_missing_has_a_reason_and_is_tried_again(
    options: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, directory: Path) -> None:
        raise environments.EnvironmentFailed(f"no distribution for {name}")

    monkeypatch.setattr(environments, "make", refuse)
    peer = quality.peer("AutoAWQ", "autoawq", "auto_awq.py", "awq")
    out = options.out / "artifacts" / "awq"
    measured = quality.make(peer, options, tmp_path, out)
    assert measured.error == "can't be installed: no distribution for autoawq"
    assert not out.with_name("awq.json").exists()


def test_what_a_contestant_wrote_is_found(tmp_path: Path) -> None:
    ours, theirs, nested = (tmp_path / name for name in ("ours", "theirs", "nested"))
    for file in ("ours/m.gguf", "ours/quantkit.json", "theirs/m.gguf", "nested/w4/config.json"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert quality.readable(ours) == ours
    assert quality.readable(theirs) == theirs / "m.gguf"
    assert quality.readable(nested) == nested / "w4"
    (nested / "config.json").touch()
    assert quality.readable(nested) == nested


def answering(monkeypatch: pytest.MonkeyPatch, refused: str | None) -> list[list[str]]:
    """Let ``quantkit eval`` refuse any call with the path ``refused``; returns its calls' paths."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert_parses(command)
        paths = command[command.index("eval") + 1 : command.index("--baseline")]
        calls.append(paths)
        if refused in paths:
            return subprocess.CompletedProcess(command, 2, "", f"error: {refused}: is broken")
        variants = [{"path": path} for path in paths]
        return subprocess.CompletedProcess(command, 0, json.dumps({"variants": variants}), "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_an_artifact_that_is_refused_does_not_stop_the_others(
    options: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / name for name in "abc"]
    calls = answering(monkeypatch, str(tmp_path / "b"))
    judged = quality.judge(options, paths)
    assert judged == {str(path): {"path": str(path)} for path in paths if path.name != "b"}
    assert len(calls) == 2
    suite = json.loads((options.out / "suite.yaml").read_text())
    assert suite["likelihood"]["rows"] == 8


def test_a_failure_that_names_no_artifact_ends_the_benchmark(
    options: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess(["quantkit"], 3, "", "error: no memory")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit, match="refused no artifact"):
        quality.judge(options, [tmp_path / "a"])


def test_the_tables(options: argparse.Namespace, tmp_path: Path) -> None:
    def entry(name: str, error: str | None = None) -> Entry:
        measured = processes.Measured(12.4, 20.0, 10**9, error)
        return Entry(Contestant(name), tmp_path / name, measured)

    entries = {
        "4 bits": [entry("quantkit"), entry("peer", "ValueError: no"), entry("strange")],
        "Q4_K_M": [entry("gguf")],
    }
    judged = {str(tmp_path / "quantkit"): variant(0.002), str(tmp_path / "gguf"): variant(0.004)}
    confirmed = {str(tmp_path / "gguf"): (0.0041, 0.0002)}
    lines = quality.render(options, entries, judged, confirmed).splitlines()
    assert "calibrated on 4 × 64 tokens of calibration.txt, judged on 8 × 64" in lines[0]
    assert "| quantkit | 4.25 | 0.002000 ± 0.000300 | 0.0100 | 98.70% | 12.346 | 12 |" in lines
    assert "| peer | – | ValueError: no | | | | |" in lines
    assert "| strange | – | can't be judged | | | | |" in lines
    assert lines[-1].endswith("| 12 | 0.004100 ± 0.000200 |")
    headers = [line for line in lines if line.startswith("|  |")]
    assert ["llama-perplexity" in header for header in headers] == [False, True]


def test_llama_cpp_is_asked_only_when_it_is_wanted(
    options: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Judge:
        def __init__(self, baseline: Path, text: Path, **_: object) -> None:
            assert baseline.name == "bf16.gguf" and text == options.heldout

        def mean_kl(self, file: Path) -> tuple[float, float]:
            return (0.5, 0.1)

    monkeypatch.setattr(quality, "Judge", Judge)
    for name in ("plain", "gguf"):
        (tmp_path / name).mkdir()
    (tmp_path / "gguf" / "m.gguf").touch()
    artifacts = [tmp_path / "plain", tmp_path / "gguf"]
    assert quality.confirm(options, tmp_path, artifacts) == {}
    options.llama_perplexity = True
    assert quality.confirm(options, tmp_path, artifacts[:1]) == {}
    assert quality.confirm(options, tmp_path, artifacts) == {str(tmp_path / "gguf"): (0.5, 0.1)}


def test_a_mixture_of_experts_has_a_column_more(options: argparse.Namespace) -> None:
    entry = Entry(quality.ours("quantkit rtn", "rtn-w4-g128"), options.out / "rtn", MEASURED)
    judged = variant(0.01)
    judged["quality"] |= {
        "experts_changed": {"mean": 0.05},
        "intervals": {"experts_changed.mean": {"low": 0.045, "high": 0.06}},
    }
    text = quality.render(options, {"4 bits": [entry]}, {str(entry.out): judged}, {})
    header, _, line = text.splitlines()[-3:]
    assert header.endswith("| seconds | tokens with other experts |")
    assert line.endswith("| 12 | 5.00% ± 0.75% |") and header.count("|") == line.count("|")
    dense = quality.render(options, {"4 bits": [entry]}, {str(entry.out): variant(0.01)}, {})
    assert "experts" not in dense
