"""The journal: steps are read back as they were recorded, and what can't be read is named."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from quantkit.assembly.journal import Step, unfinished
from quantkit.base.errors import InputError, MachineError
from quantkit.base.output import check_output
from quantkit.base.progress import Silent
from quantkit.calibration.activations import Snapshot
from quantkit.calibration.folds import Fold
from quantkit.calibration.standing import CalibrationState
from quantkit.checkpoint.written import Written
from quantkit.results.manifest import LayerReport

INPUTS = {"recipe": "a" * 64, "quantkit": "1.0"}
STEP = Step(
    part="block",
    tensors=(Written("shard-0", "w", "BF16", [2, 3], 8, 12, "b" * 64),),
    layers=(LayerReport("w", "int4 g32 sym", 0.01, "outputs", damping=0.1),),
    importance={"w": "AACAPw=="},
    calibration=CalibrationState(
        Snapshot("hidden-a", "c" * 64), None, (Fold("norm", "norm", ("q", "k"), 2, 8),)
    ),
)


def test_a_step_is_read_back_as_it_was_recorded() -> None:
    assert Step.from_json(json.loads(json.dumps(asdict(STEP)))) == STEP


def test_steps_of_an_earlier_run_are_there_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(KeyboardInterrupt),
        unfinished(out, INPUTS, force=False, progress=Silent()) as (_, journal),
    ):
        journal.record(STEP)
        raise KeyboardInterrupt
    with unfinished(out, INPUTS, force=False, progress=Silent()) as (directory, journal):
        assert journal.steps == [STEP] and directory.name == "out.partial"
    assert out.is_dir() and not list(out.iterdir())


def old_step(step: dict[str, Any]) -> dict[str, Any]:
    """As version 0.1.0.dev recorded a block."""
    return {name: step[name] for name in ("tensors", "layers", "calibration")}


@pytest.mark.parametrize(
    "change",
    [
        old_step,
        lambda step: {**step, "tensors": [{"name": "w"}]},
        lambda step: {**step, "calibration": {"hidden": None}},
        lambda step: {"done": True},
        lambda step: [step],
        lambda step: None,
    ],
)
def test_steps_of_another_version_are_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    scratch = tmp_path / "out.partial" / "unfinished"
    scratch.mkdir(parents=True)
    lines = [{"inputs": INPUTS}, change(asdict(STEP))]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (scratch / "journal.jsonl").write_text(text, encoding="utf-8")
    out = tmp_path / "out"
    with (
        pytest.raises(InputError, match="what differs: journal"),
        unfinished(out, INPUTS, force=False, progress=Silent()),
    ):
        pass
    assert (scratch / "journal.jsonl").read_text(encoding="utf-8") == text
    with unfinished(out, INPUTS, force=True, progress=Silent()) as (_, journal):
        assert not journal.steps


def test_a_whole_artifact_is_renamed_later_where_it_cannot_be_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, target: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    out = tmp_path / "out"
    with (
        monkeypatch.context() as patch,
        pytest.raises(MachineError, match="Device or resource busy"),
        unfinished(out, INPUTS, force=False, progress=Silent()) as (directory, journal),
    ):
        journal.record(STEP)
        (directory / "weights").write_text("hours of work")
        patch.setattr(Path, "rename", refuse)
    with unfinished(out, INPUTS, force=False, progress=Silent()) as (_, journal):
        assert journal.done
    assert [path.name for path in out.iterdir()] == ["weights"]


@pytest.mark.parametrize("inside", [False, True])
def test_a_stopped_run_continues_in_a_directory_that_keeps_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if inside:
        monkeypatch.chdir(out)
    for attempt in range(2):
        with (
            suppress(KeyboardInterrupt),
            unfinished(out, INPUTS, force=False, progress=Silent()) as (directory, journal),
        ):
            assert (directory.parent == out) is inside and len(journal.steps) == attempt
            (directory / "weights").write_text("hours of work")
            if not attempt:
                journal.record(STEP)
                raise KeyboardInterrupt
        check_output(out, "an artifact", "weights", force=attempt == 1)
    assert [path.name for path in out.iterdir()] == ["weights"]
