"""The summary of llama-perplexity is read, and missed when it isn't there."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks import environments
from benchmarks.llama_perplexity import Judge, parse_mean_kl

SUMMARY = """
Mean PPL(Q)                   :  12.306 ±   0.142
====== KL divergence statistics ======
Mean    KLD:   0.004812 ±   0.000067
Maximum KLD:   0.480112
"""


@pytest.mark.parametrize(
    ("output", "result"),
    [
        (SUMMARY, (0.004812, 0.000067)),
        ("Mean    KLD:  -0.000001 ±   0.000002", (-0.000001, 0.000002)),
        ("Maximum KLD:   0.480112", None),
        ("", None),
    ],
)
def test_mean_and_error_are_read(output: str, result: tuple[float, float] | None) -> None:
    assert parse_mean_kl(output) == result


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the tool prints, call by call."""
    answers: list[str] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[0].endswith("llama-perplexity")
        answer = answers.pop(0)
        return subprocess.CompletedProcess(command, int(answer == "crash"), answer, answer)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(environments, "make", lambda name, directory: None)
    return answers


def judge(folder: Path) -> Judge:
    return Judge(folder / "bf16.gguf", folder / "text", chunks=2, length=64, directory=folder)


def test_a_missing_summary_is_asked_for_once_more(outputs: list[str], tmp_path: Path) -> None:
    outputs += ["the baseline's logits", "no summary", SUMMARY]
    assert judge(tmp_path).mean_kl(tmp_path / "m.gguf") == (0.004812, 0.000067)
    outputs += ["the baseline's logits", "no summary", "no summary"]
    with pytest.raises(SystemExit, match="reported no mean KL divergence"):
        judge(tmp_path).mean_kl(tmp_path / "m.gguf")


def test_the_baselines_logits_are_kept(outputs: list[str], tmp_path: Path) -> None:
    (tmp_path / "llama-perplexity.logits").touch()
    outputs += [SUMMARY]
    judge(tmp_path).mean_kl(tmp_path / "m.gguf")
    assert not outputs


def test_a_crash_ends_the_benchmark(outputs: list[str], tmp_path: Path) -> None:
    outputs += ["crash"]
    with pytest.raises(SystemExit, match="llama-perplexity failed: crash"):
        judge(tmp_path)
