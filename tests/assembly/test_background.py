"""Writing beside the work, as on a GPU, ends in the same bytes, also where the run is stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from quantkit.base.errors import MachineError
from quantkit.calibration.activations import HiddenStates
from tests.helpers.demo_runs import FEW, PROPAGATING, Stopped, StopsAfter, Whole, digests, make

GPTQ = "gptq-w4-g128"
CASES = [GPTQ, "gguf-q4-k-m-gptq", "quantized", "corrected"]


def journal_of(tmp_path: Path) -> list[dict[str, object]]:
    path = tmp_path / "out.partial" / "unfinished" / "journal.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[1:]]


@pytest.mark.parametrize(("name", "budget"), [*((name, None) for name in CASES), (GPTQ, 1)])
def test_the_bytes_are_those_of_writing_between_the_blocks(
    whole: Whole, tmp_path: Path, name: str, budget: int | None
) -> None:
    recipe, settings = PROPAGATING.get(name, (name, FEW))
    with pytest.raises(Stopped):
        make(
            recipe,
            tmp_path / "out",
            settings,
            progress=StopsAfter(23),
            background=True,
            memory_budget=budget,
        )
    assert journal_of(tmp_path)
    make(recipe, tmp_path / "out", settings, background=True, memory_budget=budget)
    assert digests(tmp_path / "out") == digests(whole[name])
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_copy_that_is_still_written_holds_up_no_block(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other is begun meanwhile, and what was finished since is listed with the next."""
    store, go, begun = HiddenStates._store, threading.Event(), []

    def slow(hidden: HiddenStates, which: int, index: int, tensor: object) -> object:
        if index == 0:
            begun.append(which)
        if len(begun) == 1:
            assert go.wait(60)
        return store(hidden, which, index, tensor)  # type: ignore[arg-type]

    class Watches(StopsAfter):
        def advance(self, steps: int = 1, *, doing: str | None = None) -> None:
            # The first copy is written until the third block has ended.
            if doing == "layer 3 of 4":
                lines.extend(journal_of(tmp_path))
                go.set()
            if doing == "layer 4 of 4":
                raise Stopped

    lines: list[dict[str, object]] = []
    monkeypatch.setattr(HiddenStates, "_store", slow)
    with pytest.raises(Stopped):
        make(GPTQ, tmp_path / "out", background=True, progress=Watches(99))
    assert [line["part"] for line in lines] == ["outside"]
    listed = journal_of(tmp_path)
    assert [line["part"] for line in listed][:2] == ["outside", "block"]
    assert listed[-1]["calibration"] is not None
    monkeypatch.undo()
    make(GPTQ, tmp_path / "out")
    assert digests(tmp_path / "out") == digests(whole[GPTQ])


def test_a_copy_that_cannot_be_written_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(hidden: HiddenStates, *_: object) -> None:
        raise OSError(28, "No space left on device", "hidden-a")

    monkeypatch.setattr(HiddenStates, "_store", full)
    with pytest.raises(MachineError, match="no space left"):
        make(GPTQ, tmp_path / "out", background=True)


def test_without_resume_no_hidden_states_are_stored_and_the_calibration_starts_again(
    whole: Whole, tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        make(GPTQ, tmp_path / "out", resume=False, progress=StopsAfter(23))
    assert [line["part"] for line in journal_of(tmp_path)] == ["outside"]
    assert not list(tmp_path.rglob("hidden*"))
    make(GPTQ, tmp_path / "out", resume=False)
    assert digests(tmp_path / "out") == digests(whole[GPTQ])


SCRIPT = """
import sys
from pathlib import Path
from tests.helpers.demo_runs import make
make(sys.argv[1], Path(sys.argv[2]), background=True)
"""


def test_a_killed_run_ends_in_the_same_bytes(whole: Whole, tmp_path: Path) -> None:
    """For real, with SIGKILL, at a random moment."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, GPTQ, str(out)],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while not partial.exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.random())
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not out.exists():  # it may have been quicker than the kill
        make(GPTQ, out, background=True)
    assert digests(out) == digests(whole[GPTQ])
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
