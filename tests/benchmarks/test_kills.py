"""Commands are killed at random moments, and artifacts compared by what doesn't tell of the run."""

from __future__ import annotations

import inspect
import random
import sys
import time
from pathlib import Path

from benchmarks import kills
from quantkit.assembly import journal
from tests.helpers.cli import assert_parses


def worker(out: Path, seconds: float) -> list[str]:
    """A command that begins its work, takes some time and ends with ``out`` in place."""
    code = (
        "import pathlib, sys, time; out = pathlib.Path(sys.argv[1]); "
        "partial = out.with_name(out.name + '.partial'); partial.mkdir(exist_ok=True); "
        f"time.sleep({seconds}); partial.rename(out)"
    )
    return [sys.executable, "-c", code, str(out)]


def test_a_slow_command_is_killed_one_to_three_times(tmp_path: Path) -> None:
    out = tmp_path / "out"
    started = time.monotonic()
    times = [kills.kill_at_random(worker(out, 60), out, 0.01, random.Random(n)) for n in range(6)]
    assert set(times) <= {1, 2, 3} and len(set(times)) > 1
    assert not out.exists() and time.monotonic() - started < 30


def test_a_command_that_ends_first_is_not_killed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert kills.kill_at_random(worker(out, 0), out, 1000.0, random.Random(0)) == 0
    assert out.is_dir()


def test_only_the_runs_own_record_may_differ(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "model.safetensors").write_bytes(b"same")
        (folder / "run.json").write_text(folder.name)
    assert kills.digests(one) == kills.digests(other)
    (other / "extra.txt").touch()
    assert kills.digests(one) != kills.digests(other)


def test_the_command_is_quantkits(tmp_path: Path) -> None:
    command = kills.command("nf4", "demo", tmp_path, 4)
    assert_parses(command)
    assert command[1:] == [
        *("-m", "quantkit.cli", "quantize", "nf4", "--model", "demo", "--out", str(tmp_path)),
        *("--no-cache", "--set", "calibration.samples=4"),
    ]


def test_resumed_runs_are_recognized_by_their_note() -> None:
    assert kills.RESUMED in inspect.getsource(journal)
