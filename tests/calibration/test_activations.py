"""Hidden states: the same tensors from memory and from disk, and a snapshot to resume from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantkit.calibration.activations import HiddenStates, Snapshot

BUDGETS = [None, 0, 200]  # all in memory, all on disk, on disk after the first two


def states_of(block: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(block)
    return [torch.randn(1, tokens, 8, generator=generator).bfloat16() for tokens in (5, 5, 3)]


def write(hidden: HiddenStates, tensors: list[Tensor]) -> None:
    for index, tensor in enumerate(tensors):
        hidden.write(index, tensor)


def holds(hidden: HiddenStates, tensors: list[Tensor]) -> bool:
    return all(torch.equal(hidden.read(index), tensor) for index, tensor in enumerate(tensors))


def copied(hidden: HiddenStates) -> Snapshot:
    copy = hidden.commit()
    assert copy is not None
    return copy.result()


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_block_replaces_the_hidden_states(tmp_path: Path, budget: int | None) -> None:
    hidden = HiddenStates(tmp_path, budget)
    hidden.extend(states_of(0))
    assert hidden.spilled is (budget is not None)
    assert holds(hidden, states_of(0))
    for block in (1, 2, 3):
        write(hidden, states_of(block))
        hidden.commit()
        assert holds(hidden, states_of(block))
    hidden.replace(1, states_of(4)[1])
    assert torch.equal(hidden.read(1), states_of(4)[1])
    assert torch.equal(hidden.read(0), states_of(3)[0])


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_run_that_was_killed_inside_a_block_gets_its_inputs(
    tmp_path: Path, budget: int | None
) -> None:
    hidden = HiddenStates(tmp_path, budget)
    hidden.extend(states_of(0))
    write(hidden, states_of(1))
    snapshot = copied(hidden)
    hidden.write(0, states_of(2)[0])
    again = HiddenStates(tmp_path, budget)
    again.extend(states_of(0))
    assert again.restore(snapshot) and holds(again, states_of(1))
    write(again, states_of(2))
    again.commit()
    assert holds(again, states_of(2))


def test_a_damaged_or_missing_snapshot_is_refused(tmp_path: Path) -> None:
    hidden = HiddenStates(tmp_path)
    hidden.extend(states_of(0))
    write(hidden, states_of(1))
    snapshot = copied(hidden)
    path = tmp_path / snapshot.file
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    assert not hidden.restore(snapshot)
    path.unlink()
    assert not hidden.restore(snapshot)
    assert not HiddenStates().restore(snapshot)


def test_without_a_directory_nothing_is_stored_on_disk(tmp_path: Path) -> None:
    hidden = HiddenStates(budget=0)
    hidden.extend(states_of(0))
    write(hidden, states_of(1))
    assert hidden.commit() is None and not hidden.spilled and holds(hidden, states_of(1))
    assert not list(tmp_path.iterdir())
