"""Replay: parts of a block that are found, and modules that only look like one."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from quantkit.calibration.activations import HiddenStates
from quantkit.calibration.replay import Replay
from quantkit.model.stream import Batch


class Mlp(nn.Module):
    """Returns what ``down`` returns, and ``rest`` after it; counts its forwards.

    doubled: whether the output of ``down`` is doubled first.
    """

    def __init__(self, *, rest: tuple[None, ...] | None, doubled: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.rest, self.doubled, self.forwards = rest, doubled, 0

    def forward(self, hidden: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        self.forwards += 1
        output = self.down(self.up(hidden).relu())
        output = output * 2 if self.doubled else output
        return output if self.rest is None else (output, *self.rest)


class Block(nn.Module):
    def __init__(self, *, rest: tuple[None, ...] | None = None, doubled: bool = False) -> None:
        super().__init__()
        self.mlp = Mlp(rest=rest, doubled=doubled)
        self.last = nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        output = self.mlp(hidden)
        return hidden + self.last(output if self.mlp.rest is None else output[0])


def observed(block: Block, hidden: list[Tensor]) -> tuple[Replay, HiddenStates]:
    """A replay that has watched the first forward, and what ``mlp.down`` reads in all of them."""
    linears = {"mlp.up": block.mlp.up, "mlp.down": block.mlp.down, "last": block.last}
    replay, inputs = Replay(block, linears), HiddenStates()
    handle = block.mlp.down.register_forward_pre_hook(lambda _, args: inputs.extend([args[0]]))
    with torch.inference_mode():
        with replay.watching(batch(hidden[0])):
            block(hidden[0])
        for rows in hidden[1:]:
            block(rows)
    handle.remove()
    return replay, inputs


def batch(hidden: Tensor) -> Batch:
    return Batch(torch.zeros(hidden.shape[:-1], dtype=torch.int64), hidden, [])


def computed(replay: Replay, block: Block, hidden: list[Tensor]) -> list[Tensor]:
    return [
        replay.compute(number, batch(rows), partial(block, rows))
        for number, rows in enumerate(hidden)
    ]


@pytest.fixture
def hidden() -> list[Tensor]:
    return list(torch.randn(3, 2, 5, 8, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("rest", [None, (), (None,)])
@torch.inference_mode()
def test_of_a_finished_part_only_the_last_linear_is_computed(
    hidden: list[Tensor], rest: tuple[None, ...] | None
) -> None:
    block = Block(rest=rest)
    replay, inputs = observed(block, hidden)
    assert replay.use_inputs(["mlp.down"], inputs)
    assert not replay.use_inputs(["mlp.up", "last"], inputs)
    whole = [block(rows) for rows in hidden]
    replay.finish(["mlp.up"])
    block.mlp.forwards = 0
    computed(replay, block, hidden)
    assert block.mlp.forwards == len(hidden)  # ``mlp.down`` isn't finished
    replay.finish(["mlp.down"])
    block.mlp.forwards = 0
    replayed = computed(replay, block, hidden)
    assert block.mlp.forwards == 1  # the first batch, to compare
    assert all(map(torch.equal, replayed, whole))


@torch.inference_mode()
def test_a_part_with_an_unfinished_linear_is_computed(hidden: list[Tensor]) -> None:
    block = Block()
    replay, inputs = observed(block, hidden)
    replay.use_inputs(["mlp.down"], inputs)
    replay.finish(["mlp.down"])
    block.mlp.forwards = 0
    replay.compute(1, batch(hidden[1]), lambda: block(hidden[1]))
    assert block.mlp.forwards == 1


@torch.inference_mode()
def test_a_module_that_changes_its_last_linears_output_is_no_part(hidden: list[Tensor]) -> None:
    replay, inputs = observed(Block(doubled=True), hidden)
    assert not replay.use_inputs(["mlp.up", "mlp.down", "last"], inputs)


@torch.inference_mode()
def test_where_a_replayed_part_differs_all_is_computed(hidden: list[Tensor]) -> None:
    block = Block()
    replay, inputs = observed(block, hidden)
    replay.use_inputs(["mlp.down"], inputs)
    replay.finish(["mlp.up", "mlp.down"])
    block.mlp.doubled = True  # unlike in the forward that was watched
    whole = [block(rows) for rows in hidden]
    assert all(map(torch.equal, computed(replay, block, hidden), whole))
    assert not replay.use_inputs(["mlp.down"], inputs)
