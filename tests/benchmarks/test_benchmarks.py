"""What the benchmarks stand on: a process measured, its failure told, the checkpoints they use."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from quantkit.calibration.text import load_tokenizer, pack
from quantkit.checkpoint.reader import Checkpoint

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import processes  # type: ignore[import-not-found]

    return processes


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import models  # type: ignore[import-not-found]

    return models


def test_cpu_time_is_counted_with_that_of_children(processes: ModuleType, tmp_path: Path) -> None:
    work = "import time\nwhile time.process_time() < 0.4: pass"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work!r}], check=True)"
    measured = processes.run([sys.executable, "-c", outer], tmp_path / "log", settings={})
    assert measured.error is None
    assert measured.cpu >= 0.4
    assert measured.wall >= 0.4


def test_a_failure_is_told_in_its_own_words(processes: ModuleType, tmp_path: Path) -> None:
    code = "raise FileNotFoundError('/somewhere/deep/weights.bin, see https://a.org/b/c')"
    measured = processes.run([sys.executable, "-c", code], tmp_path / "log", settings={})
    assert measured.error == "FileNotFoundError: …/weights.bin, see https://a.org/b/c"


def test_a_slow_command_is_stopped(processes: ModuleType, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    measured = processes.run(command, tmp_path / "log", timeout=1.0, settings={})
    assert measured.error == "stopped after 1 s"
    assert measured.wall < 30


def test_checkpoints_are_the_same_every_time(models: ModuleType, tmp_path: Path) -> None:
    first, second = (models.make("tiny", tmp_path / name) for name in "ab")
    for file in sorted(path.relative_to(first) for path in first.rglob("*.*") if path.is_file()):
        assert (first / file).read_bytes() == (second / file).read_bytes(), file
    checkpoint = Checkpoint(first / "model")
    assert set(checkpoint.keys()) == {name for name, _ in models.SHAPES["tiny"].tensors()}


def test_peers_get_the_rows_that_quantkit_calibrates_on(models: ModuleType, tmp_path: Path) -> None:
    feed = models.make("tiny", tmp_path)
    tokenizer = load_tokenizer(feed / "model")
    ours = pack(models.CALIBRATION, tokenizer, sequence_length=512, rows=16, seed=0)
    assert json.loads((feed / "rows.json").read_text()) == ours.ids.tolist()
