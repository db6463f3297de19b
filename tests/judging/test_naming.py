"""Names of artifacts in a comparison: each has its own, and people can tell which is which."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from quantkit.base.errors import InputError
from quantkit.base.resources import demo_model
from quantkit.checkpoint.reader import Checkpoint
from quantkit.judging.naming import named_artifacts
from tests.helpers.tiny import build

Place = Callable[[str], Path]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def place(tmp_path: Path, tiny_artifact: Path) -> Place:
    """Copies a checkpoint without a recipe to a path below the test's directory."""

    def copy(name: str) -> Path:
        return shutil.copytree(tiny_artifact, tmp_path / name)

    return copy


@pytest.fixture(scope="module")
def tiny_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    return build("llama", tmp_path_factory.mktemp("names") / "tiny", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["one", "two"], ["one", "two"]),
        (["monday/out", "tuesday/out"], ["monday/out", "tuesday/out"]),
        (["a/x/out", "b/x/out", "c/y/out"], ["a/x/out", "b/x/out", "y/out"]),
        (["a/out", "b/out", "other"], ["a/out", "b/out", "other"]),
        (["a/a", "a/b/a"], ["a/a", "b/a"]),
        ([f"models--x--llm/snapshots/{COMMIT}", "other"], ["llm", "other"]),
        (
            [f"models--{owner}--llm/snapshots/{COMMIT}" for owner in ("x", "y")],
            ["x/llm@01234567", "y/llm@01234567"],
        ),
    ],
)
def test_the_shortest_end_of_a_path_that_is_unique_is_the_name(
    place: Place, given: list[str], shown: list[str]
) -> None:
    named = named_artifacts(paths := [place(name) for name in given], None)
    assert list(named) == shown
    assert list(named.values()) == paths


def test_no_artifact_is_called_like_a_row_of_the_baseline(place: Place) -> None:
    named = named_artifacts([place("small/BF16"), place("BF16 GGUF")], Checkpoint(demo_model()))
    first, second = named
    assert first == "small/BF16" and second.endswith("/BF16 GGUF")


def test_a_name_is_one_where_the_path_is_the_working_directory(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place("here"))
    assert list(named_artifacts([Path(".")], None)) == ["here"]
    assert list(named_artifacts([Path("../here")], None)) == ["here"]


@pytest.mark.parametrize("again", ["out", "./out", "x/../out", "link", "out/"])
def test_an_artifact_given_twice_is_refused(
    place: Place, again: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place("out")
    (tmp_path / "x").mkdir()
    (tmp_path / "link").symlink_to("out")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is given twice") as caught:
        named_artifacts([Path("out"), Path(again)], None)
    assert Path(again) == Path("out") or "also as out" in str(caught.value)
