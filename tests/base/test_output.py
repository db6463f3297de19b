"""Output directories: whole or not at all, and nothing is replaced that we didn't make."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from quantkit.base.errors import InputError, MachineError
from quantkit.base.output import check_output, new_directory

KIND = ("an artifact", "quantkit.json")


def test_directories_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), new_directory(out) as directory:
        (directory / "file").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with new_directory(out) as directory:
        (directory / "quantkit.json").write_text("{}")
        assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with new_directory(out) as directory:
        (directory / "new").write_text("")
    assert [path.name for path in out.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_replacement_leaves_the_old_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_directory(out) as directory:
        (directory / "quantkit.json").write_text("old")
    with pytest.raises(KeyboardInterrupt), new_directory(out):
        raise KeyboardInterrupt
    assert (out / "quantkit.json").read_text() == "old"


def test_outputs_that_must_not_be_replaced(tmp_path: Path) -> None:
    check_output(tmp_path / "new", *KIND, force=False, needed=1)
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="exists already"):
        check_output(tmp_path, *KIND, force=False, needed=1)
    with pytest.raises(InputError, match="isn't an artifact of ours"):
        check_output(tmp_path, *KIND, force=True, needed=1)
    (tmp_path / "quantkit.json").write_text("{}")
    check_output(tmp_path, *KIND, force=True, needed=1)


def test_too_little_disk_is_refused_before_work(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(MachineError, match="this needs"):
        check_output(tmp_path / "new", *KIND, force=False, needed=2 * free)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with (
        pytest.raises(MachineError, match="can't be read or written"),
        new_directory(blocked / "out"),
    ):
        pass
