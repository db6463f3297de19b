"""The cache of statistics: what is found again, and what never becomes an entry."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantkit.base.errors import MachineError
from quantkit.calibration import cache
from quantkit.calibration.cache import CacheWriter, find_statistics
from quantkit.calibration.statistics import InputStatistics, Kind, new_moment

ABOUT = {"checkpoint": "c", "calibration rows": "r"}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path))
    return tmp_path


def statistics(kind: Kind) -> list[InputStatistics]:
    moment = new_moment(kind, 300, CPU)
    moment.add(torch.randn(40, 300, generator=torch.Generator().manual_seed(1)))
    energy = {"q_proj": torch.tensor(3.5, dtype=torch.float64)}
    return [InputStatistics(["q_proj"], 300, moment, 40, energy)]


def write(kind: Kind, layers: int = 2) -> None:
    with CacheWriter(ABOUT, kind, layers) as writer:
        for index in range(layers):
            writer.save(index, statistics(kind))


@pytest.mark.parametrize("kind", ["gram", "diagonal"])
def test_statistics_come_back_to_the_last_bit(kind: Kind) -> None:
    write(kind)
    cached = find_statistics(ABOUT, kind)
    assert cached is not None
    [loaded], [original] = cached.load(1, CPU), statistics(kind)
    assert loaded.consumers == original.consumers
    assert (loaded.width, loaded.tokens) == (original.width, original.tokens)
    assert loaded.energy == original.energy
    for part, other in zip(loaded.moment.parts(), original.moment.parts(), strict=True):
        assert torch.equal(part, other)


def test_gram_matrices_serve_where_a_diagonal_is_needed() -> None:
    assert find_statistics(ABOUT, "diagonal") is None
    write("gram")
    cached = find_statistics(ABOUT, "diagonal")
    assert cached is not None
    [loaded], [diagonal] = cached.load(0, CPU), statistics("diagonal")
    assert torch.equal(loaded.moment.diagonal(), diagonal.moment.diagonal())
    assert find_statistics({**ABOUT, "dtype": "other"}, "gram") is None


def test_an_unfinished_entry_is_discarded(directory: Path) -> None:
    with pytest.raises(KeyboardInterrupt), CacheWriter(ABOUT, "gram", 2) as writer:
        writer.save(0, statistics("gram"))
        raise KeyboardInterrupt
    with CacheWriter(ABOUT, "gram", 2) as writer:
        writer.save(0, statistics("gram"))
    assert cache.entries() == []
    assert not list((directory / "statistics").iterdir())


def test_an_entry_larger_than_the_limit_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTKIT_CACHE_LIMIT", "0.000001")
    write("gram")
    assert cache.entries() == []


def test_damaged_statistics_are_refused_and_removed(directory: Path) -> None:
    write("gram")
    [file] = (directory / "statistics").glob("*/layer-0001.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    cached = find_statistics(ABOUT, "gram")
    assert cached is not None
    with pytest.raises(MachineError, match="damaged and have been removed"):
        cached.load(1, CPU)
    assert find_statistics(ABOUT, "gram") is None


def test_an_entry_that_holds_up_a_gpu_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()

    def slow(*args: Any) -> None:
        assert go.wait(60)
        save_file(*args)

    monkeypatch.setattr("quantkit.calibration.cache.save_file", slow)
    with CacheWriter(ABOUT, "gram", 2, patient=False) as writer:
        writer.save(0, statistics("gram"))
        writer.save(1, statistics("gram"))  # returns, though the first isn't written
        go.set()
    assert not cache.entries() and not list(cache.directory().rglob("layer*"))
    with CacheWriter(ABOUT, "gram", 2, patient=False) as writer:
        for index in range(2):
            writer.save(index, statistics("gram"))
            writer._wait()
    assert len(cache.entries()) == 1
