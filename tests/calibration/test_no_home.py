"""A user without a home directory, as in ``docker run -u 12345``, does without a cache."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from quantkit.base.errors import MachineError
from quantkit.calibration import cache
from quantkit.calibration.cache import CacheWriter, find_statistics
from quantkit.checkpoint.source import locate_adapter, locate_model
from tests.helpers.cli import refused


@pytest.fixture(autouse=True)
def no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "QUANTKIT_CACHE", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    monkeypatch.chdir(tmp_path)


def test_runs_do_without_a_cache(tmp_path: Path) -> None:
    assert find_statistics({"checkpoint": "a"}, "gram") is None
    assert find_statistics({"checkpoint": "a"}, "diagonal") is None
    with CacheWriter({"checkpoint": "a"}, "gram", 1) as writer:
        writer.save(0, [])
    assert not list(tmp_path.iterdir())


def test_commands_on_the_cache_say_what_to_set() -> None:
    for command in ("list", "clear"):
        assert "no home directory" in refused(3, "cache", command)
    with pytest.raises(MachineError, match="no home directory"):
        cache.directory()


@pytest.mark.parametrize("locate", [locate_model, locate_adapter])
def test_nothing_is_downloaded_into_a_folder_named_tilde(locate: object, tmp_path: Path) -> None:
    assert callable(locate)
    with pytest.raises(MachineError, match="no home directory to download into"):
        locate("owner/name")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["QUANTKIT_CACHE", "XDG_CACHE_HOME", "HOME"])
def test_any_of_the_variables_gives_a_cache(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, str(tmp_path / "place"))
    assert (tmp_path / "place") in [cache.directory(), *cache.directory().parents]
