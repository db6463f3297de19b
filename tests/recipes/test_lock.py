"""Published recipes and suites never change: the lock, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from quantkit.base import resources
from quantkit.base.errors import InputError
from quantkit.cli import app
from quantkit.recipes.lock import LOCK_FILE, check_lock, read_lock

RECIPE = """
schema: 1
name: mine
version: 1.0.0
quantize: {method: awq, bits: 4, group_size: 128, symmetric: false, format: awq}
calibration: {dataset: text.txt, samples: 2, sequence_length: 8}
"""
SUITE = "schema: 1\nname: judge\nversion: 1.0.0\nlikelihood: {dataset: ../text.txt}\n"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["recipes", "check", *map(str, arguments)])


def problems(*arguments: object) -> list[tuple[str, str]]:
    """What the check finds; its exit code must agree."""
    result = run(*arguments, "--json")
    found = [(p["document"], p["problem"]) for p in json.loads(result.stdout)["problems"]]
    assert result.exit_code == bool(found), result.output
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A recipe and a suite of somebody's own, locked."""
    (tmp_path / "suites").mkdir()
    (tmp_path / "mine.yaml").write_text(RECIPE)
    (tmp_path / "suites" / "judge.yaml").write_text(SUITE)
    (tmp_path / "text.txt").write_text("some text")
    assert run(tmp_path, "--write").exit_code == 0
    return tmp_path


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_what_ships_is_locked() -> None:
    assert problems() == []
    names = {entry[:2] for entry in read_lock(resources.recipes() / LOCK_FILE)}
    shipped = {("recipe", path.stem) for path in resources.recipes().glob("*.yaml")}
    assert shipped | {("suite", "demo"), ("file", "suites/demo-heldout.jsonl")} <= names


def test_the_shipped_workflow_checks_it() -> None:
    root = Path(__file__).parents[2]
    workflow = yaml.safe_load((root / ".github/workflows/ci.yml").read_text())
    assert {"run": "make recipes"} in workflow["jobs"]["check"]["steps"]
    assert "recipes check" in (root / "Makefile").read_text()


def test_nothing_is_wrong_with_a_locked_folder(folder: Path) -> None:
    assert problems(folder) == []
    assert {entry[0] for entry in read_lock(folder / LOCK_FILE)} == {"recipe", "suite", "file"}


def test_a_comment_is_no_change(folder: Path) -> None:
    edit(folder / "mine.yaml", "schema: 1", "schema: 1  # as ever")
    assert problems(folder) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "where", "what"),
    [
        ("mine.yaml", "samples: 2", "samples: 3", "recipe mine 1.0.0", "its version hasn't"),
        ("suites/judge.yaml", "}", ", rows: 2}", "suite judge 1.0.0", "its version hasn't"),
        ("text.txt", "some", "other", "file text.txt", "has changed since"),
        ("mine.yaml", "1.0.0", "1.0.1", "recipe mine 1.0.1", "isn't locked"),
        ("mine.yaml", "name: mine", "name: other", "recipe mine 1.0.0", "doesn't exist any more"),
    ],
)
def test_what_the_lock_refuses(
    folder: Path, file: str, old: str, new: str, where: str, what: str
) -> None:
    edit(folder / file, old, new)
    found = dict(problems(folder))
    assert what in found[where]


def test_a_new_version_is_added_and_the_old_one_stays(folder: Path) -> None:
    (folder / "more.txt").write_text("more")
    edit(folder / "mine.yaml", "1.0.0", "1.1.0")
    edit(folder / "mine.yaml", "text.txt", "more.txt")
    before = read_lock(folder / LOCK_FILE)
    assert run(folder, "--write").exit_code == 0
    after = read_lock(folder / LOCK_FILE)
    assert before.items() <= after.items()
    assert set(after) - set(before) == {("recipe", "mine", "1.1.0"), ("file", "more.txt")}
    assert problems(folder) == []
    edit(folder / "mine.yaml", "1.1.0", "1.0.0")  # a number used before, for something else
    assert problems(folder) == [("recipe mine 1.0.0", "has changed, and its version hasn't")]


def test_writing_never_changes_what_is_locked(folder: Path) -> None:
    edit(folder / "mine.yaml", "samples: 2", "samples: 3")
    before = (folder / LOCK_FILE).read_bytes()
    assert problems(folder, "--write")
    assert (folder / LOCK_FILE).read_bytes() == before


def test_a_lock_of_its_own_place(folder: Path) -> None:
    lock = folder / "suites" / "my.lock"
    assert run(folder, "--lock", lock, "--write").exit_code == 0
    assert ("file", "../text.txt") in read_lock(lock)
    assert problems(folder, "--lock", lock) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("recipe mine 1.0.0", "isn't a line of a lock"),
        ("recipe mine 1.0.0 " + "a" * 64, "is locked twice"),
        ("poem mine 1.0.0 " + "a" * 64, "isn't a line of a lock"),
    ],
)
def test_a_damaged_lock_is_named_by_line(folder: Path, line: str, message: str) -> None:
    with (folder / LOCK_FILE).open("a") as file:
        file.write(line + "\n")
    result = run(folder)
    assert result.exit_code == 2 and message in result.stderr
    assert f"{LOCK_FILE}:5" in result.stderr.replace("\n", "")


def test_a_folder_that_cannot_be_checked(folder: Path) -> None:
    result = run(folder / "nowhere")
    assert result.exit_code == 2 and "isn't a folder" in result.stderr
    (folder / "again.yaml").write_text(RECIPE)
    with pytest.raises(InputError, match="has the name of"):
        check_lock(folder, folder / LOCK_FILE)
    (folder / "again.yaml").unlink()
    (folder / "text.txt").unlink()
    with pytest.raises(InputError, match="doesn't exist"):
        check_lock(folder, folder / LOCK_FILE)
    (folder / "mine.yaml").unlink()
    (folder / "suites" / "judge.yaml").unlink()
    with pytest.raises(InputError, match="holds no recipe"):
        check_lock(folder, folder / LOCK_FILE)
