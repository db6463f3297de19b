"""A run that is stopped goes on where it was, and ends in the very same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from quantkit.base.errors import InputError, MachineError
from quantkit.calibration import cache
from quantkit.commands.quantize import made_already, prepare
from quantkit.recipes.recipe import load_recipe
from tests.helpers.demo_runs import FEW, PROPAGATING, Stopped, StopsAfter, Whole, digests, make

QUANTKIT = str(Path(sys.executable).with_name("quantkit"))


@pytest.mark.parametrize("recipe", ["awq-w4-g128", "gptq-w4-g128", "gguf-q4-k-m"])
def test_killed_runs_end_in_the_same_bytes(whole: Whole, tmp_path: Path, recipe: str) -> None:
    """For real, with SIGKILL, at random moments."""
    command = [QUANTKIT, "quantize", recipe, "--model", "demo", "--set", FEW[0], "--no-cache"]
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    chance = random.Random(recipe)
    for _ in range(2):
        process = subprocess.Popen(
            [*command, "--out", str(out)],
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        while not partial.exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.random() * 3)
        process.send_signal(signal.SIGKILL)
        process.wait()
    if not out.exists():  # it may have been quicker than the kill
        make(recipe, out)
    assert digests(out) == digests(whole[recipe])
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize(
    "name",
    [
        *("awq-w4-g128", "gptq-w4-g128", "gguf-q4-k-m", "gguf-q4-k-m-gptq", "int8-w8a8"),
        *PROPAGATING,
    ],
)
@pytest.mark.parametrize("steps", [6, 20])
def test_no_block_is_done_twice(whole: Whole, tmp_path: Path, name: str, steps: int) -> None:
    recipe, settings = PROPAGATING.get(name, (name, FEW))
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        make(recipe, out, settings, progress=StopsAfter(steps))
    journal = tmp_path / "out.partial" / "unfinished" / "journal.jsonl"
    before = journal.read_bytes()
    assert before.count(b"\n") >= 2
    with pytest.raises(Stopped):  # soon: what was found is one step, whatever it holds
        make(recipe, out, settings, progress=StopsAfter(2))
    assert journal.read_bytes().startswith(before)
    make(recipe, out, settings)
    assert digests(out) == digests(whole[name])
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def stopped(tmp_path: Path) -> Path:
    with pytest.raises(Stopped):
        make("gptq-w4-g128", tmp_path / "out", progress=StopsAfter(20))
    return tmp_path / "out.partial"


def test_other_inputs_are_refused_by_name_and_force_starts_again(
    whole: Whole, tmp_path: Path
) -> None:
    partial = stopped(tmp_path)
    before = digests(partial)
    with pytest.raises(InputError, match="what differs: recipe, calibration rows"):
        make("gptq-w4-g128", tmp_path / "out", ["calibration.samples=8"])
    assert digests(partial) == before
    make("gptq-w4-g128", tmp_path / "out", ["calibration.samples=8"], force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize("damaged", ["shard-0", "hidden-a", "hidden-b", "journal.jsonl"])
def test_damaged_work_is_not_built_on(whole: Whole, tmp_path: Path, damaged: str) -> None:
    partial = stopped(tmp_path)
    (path,) = partial.rglob(damaged)
    content = bytearray(path.read_bytes())
    middle = len(content) * 2 // 3
    content[middle : middle + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(bytes(content))
    try:
        make("gptq-w4-g128", tmp_path / "out")
    except InputError as error:  # a damaged first line is told from no journal
        assert damaged == "journal.jsonl" and "journal" in error.what
        make("gptq-w4-g128", tmp_path / "out", force=True)
    assert digests(tmp_path / "out") == digests(whole["gptq-w4-g128"])


def test_a_line_cut_short_counts_for_nothing(whole: Whole, tmp_path: Path) -> None:
    journal = stopped(tmp_path) / "unfinished" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-7])
    make("gptq-w4-g128", tmp_path / "out")
    assert digests(tmp_path / "out") == digests(whole["gptq-w4-g128"])


def test_two_runs_do_not_work_in_one_place(tmp_path: Path) -> None:
    import fcntl

    partial = stopped(tmp_path)
    with (partial / "unfinished" / "journal.jsonl").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another run is writing"):
            make("gptq-w4-g128", tmp_path / "out")


def test_hidden_states_wait_on_disk_past_the_budget(whole: Whole, tmp_path: Path) -> None:
    make("awq-w4-g128", tmp_path / "out", memory_budget=1)
    assert digests(tmp_path / "out") == digests(whole["awq-w4-g128"])
    with pytest.raises(Stopped):
        make("gptq-w4-g128", tmp_path / "gptq", memory_budget=1, progress=StopsAfter(20))
    make("gptq-w4-g128", tmp_path / "gptq", memory_budget=1)
    assert digests(tmp_path / "gptq") == digests(whole["gptq-w4-g128"])
    recipe, settings = PROPAGATING["corrected"]
    make(recipe, tmp_path / "corrected", settings, memory_budget=1)
    assert digests(tmp_path / "corrected") == digests(whole["corrected"])


@pytest.mark.parametrize("name", ["corrected", "corrected-gguf"])
def test_corrected_inputs_give_the_same_bytes_for_any_number_of_threads(
    whole: Whole, tmp_path: Path, name: str
) -> None:
    recipe, settings = PROPAGATING[name]
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        make(recipe, tmp_path / "out", settings)
    finally:
        torch.set_num_threads(threads)
    assert digests(tmp_path / "out") == digests(whole[name])


def test_kept_statistics_give_the_same_bytes(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    make("gptq-w4-g128", tmp_path / "first", cache=True)
    assert len(cache.entries()) == 1
    monkeypatch.setattr(
        "quantkit.calibration.passing.Meter", lambda *_: pytest.fail("calibrated again")
    )
    for recipe in ("gptq-w4-g128", "awq-w4-g128", "gguf-q4-k-m"):
        make(recipe, tmp_path / recipe, cache=True)
        assert digests(tmp_path / recipe) == digests(whole[recipe])


def test_statistics_are_kept_for_what_they_are_of_and_within_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    make("gptq-w4-g128", tmp_path / "a", cache=True)
    make("gptq-w4-g128", tmp_path / "b", ["calibration.samples=8"], cache=True)
    entries = cache.entries()
    assert len(entries) == 2
    # Room for one only: the one used longest ago goes.
    monkeypatch.setenv("QUANTKIT_CACHE_LIMIT", str(entries[0].nbytes * 1.5 / 1e9))
    make("gptq-w4-g128", tmp_path / "c", ["calibration.samples=4"], cache=True)
    assert [entry.path for entry in cache.entries()] != [entry.path for entry in entries]
    assert len(cache.entries()) == 1
    monkeypatch.setenv("QUANTKIT_CACHE_LIMIT", "0")
    make("gptq-w4-g128", tmp_path / "d", ["calibration.samples=2"], cache=True)
    assert len(cache.entries()) == 1
    assert cache.clear() > 0 and cache.entries() == []
    monkeypatch.setenv("QUANTKIT_CACHE_LIMIT", "much")
    with pytest.raises(MachineError, match="not a number of gigabytes"):
        cache.limit()


def test_damaged_statistics_are_removed_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    make("gptq-w4-g128", tmp_path / "first", cache=True)
    (entry,) = cache.entries()
    layer = entry.path / "layer-0002.safetensors"
    content = bytearray(layer.read_bytes())
    content[-5] ^= 1
    layer.write_bytes(bytes(content))
    with pytest.raises(MachineError, match="damaged and have been removed"):
        make("gptq-w4-g128", tmp_path / "again", cache=True)
    make("gptq-w4-g128", tmp_path / "again", cache=True)
    assert digests(tmp_path / "again") == digests(tmp_path / "first")


def test_an_artifact_of_the_same_inputs_is_recognised(whole: Whole) -> None:
    out = whole["gptq-w4-g128"]
    assert made_already(prepare(load_recipe("gptq-w4-g128", FEW), "demo"), out)
    assert not made_already(prepare(load_recipe("gptq-w4-g128"), "demo"), out)
    assert not made_already(prepare(load_recipe("nf4"), "demo"), out.parent / "none")
