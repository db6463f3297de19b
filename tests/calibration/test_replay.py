"""What a block needn't compute again: parts that are found, and those that only seem so."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from quantkit.calibration.activations import HiddenStates
from quantkit.calibration.replay import Replay
from quantkit.model.stream import Batch


class Mlp(nn.Module):
    """Ends in ``down``; counts its forwards. beside: what it returns with its tensor."""

    def __init__(self, *, beside: tuple[None, ...] | None, doubled: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.beside, self.doubled, self.computed = beside, doubled, 0

    def forward(self, hidden: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        self.computed += 1
        made = self.down(self.up(hidden).relu())
        made = made * 2 if self.doubled else made
        return made if self.beside is None else (made, *self.beside)


class Block(nn.Module):
    def __init__(self, *, beside: tuple[None, ...] | None = None, doubled: bool = False) -> None:
        super().__init__()
        self.first = Mlp(beside=beside, doubled=doubled)
        self.last = nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        made = self.first(hidden)
        return hidden + self.last(made if self.first.beside is None else made[0])


def observed(block: Block, hidden: list[Tensor]) -> tuple[Replay, HiddenStates]:
    """A replay that has seen the first forward, and what ``down`` reads."""
    linears = {"first.up": block.first.up, "first.down": block.first.down, "last": block.last}
    replay, read = Replay(block, linears), HiddenStates()
    handle = block.first.down.register_forward_pre_hook(lambda _, args: read.start([args[0]]))
    with torch.inference_mode():
        with replay.watching(batch(hidden[0])):
            block(hidden[0])
        for rows in hidden[1:]:
            block(rows)
    handle.remove()
    return replay, read


def batch(hidden: Tensor) -> Batch:
    return Batch(torch.zeros(hidden.shape[:-1], dtype=torch.int64), hidden, [])


@pytest.fixture
def hidden() -> list[Tensor]:
    return list(torch.randn(3, 2, 5, 8, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("beside", [None, (), (None,)])
@torch.inference_mode()
def test_a_finished_part_is_its_last_linear_alone(
    hidden: list[Tensor], beside: tuple[None, ...] | None
) -> None:
    block = Block(beside=beside)
    replay, read = observed(block, hidden)
    assert replay.keep(["first.down"], read) and not replay.keep(["first.up", "last"], read)
    whole = [block(rows) for rows in hidden]
    replay.finish(["first.up"])
    block.first.computed = 0
    given = [replay.compute(n, batch(h), partial(block, h)) for n, h in enumerate(hidden)]
    assert block.first.computed == len(hidden)  # nothing is known yet
    replay.finish(["first.down"])
    block.first.computed = 0
    given = [replay.compute(n, batch(h), partial(block, h)) for n, h in enumerate(hidden)]
    assert block.first.computed == 1  # in the first place, to compare
    assert all(map(torch.equal, given, whole))


@torch.inference_mode()
def test_a_part_in_which_a_linear_is_left_is_computed(hidden: list[Tensor]) -> None:
    block = Block()
    replay, read = observed(block, hidden)
    replay.keep(["first.down"], read)
    replay.finish(["first.down"])
    block.first.computed = 0
    replay.compute(1, batch(hidden[1]), lambda: block(hidden[1]))
    assert block.first.computed == 1


@torch.inference_mode()
def test_what_goes_on_after_the_last_linear_is_no_part(hidden: list[Tensor]) -> None:
    replay, read = observed(Block(doubled=True), hidden)
    assert not replay.keep(["first.up", "first.down", "last"], read)


@torch.inference_mode()
def test_where_a_part_gives_something_else_all_is_computed(hidden: list[Tensor]) -> None:
    block = Block()
    replay, read = observed(block, hidden)
    replay.keep(["first.down"], read)
    replay.finish(["first.up", "first.down"])
    block.first.doubled = True  # it wasn't when it was watched
    whole = [block(rows) for rows in hidden]
    given = [replay.compute(n, batch(h), partial(block, h)) for n, h in enumerate(hidden)]
    assert all(map(torch.equal, given, whole))
    assert not replay.keep(["first.down"], read)
