"""The first block of a checkpoint, with the statistics of what its linears read."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from quantkit.calibration.folds import Fold
from quantkit.calibration.needs import Needs
from quantkit.calibration.passing import CalibrationPass
from quantkit.calibration.statistics import InputStatistics
from quantkit.calibration.text import Rows
from quantkit.checkpoint.reader import Checkpoint
from quantkit.methods.linears import BlockResult
from quantkit.model.skeleton import Skeleton
from quantkit.model.stream import Batch, Stream


def random_rows(count: int, length: int) -> Rows:
    """Rows of random tokens, which every tiny model has in its vocabulary."""
    ids = torch.randint(0, 96, (count, length), generator=torch.Generator().manual_seed(5))
    return Rows(ids, "")


def stream_of(directory: Path) -> Stream:
    checkpoint = Checkpoint(directory)
    return Stream(Skeleton(checkpoint), checkpoint, torch.device("cpu"))


@dataclass(frozen=True)
class MeasuredBlock:
    """A copy of layer 0, its statistics and folds, and a batch of two rows to run it on."""

    block: nn.Module
    inputs: list[InputStatistics]
    folds: list[Fold]
    batch: Batch

    @torch.inference_mode()
    def output(self, block: nn.Module | None = None) -> Tensor:
        """What the block, or another in its place, returns for the batch."""
        block, call = block or self.block, self.batch.calls[0]
        return block(self.batch.hidden, *call.args, **call.kwargs)

    def replaced(self, result: BlockResult) -> nn.Module:
        """A copy of the block with its quantized weights and all that was rescaled."""
        block = copy.deepcopy(self.block)
        for name, linear in result.linears.items():
            weight = block.get_parameter(f"{name}.weight")
            weight.data = linear.tensor.dequantize().to(weight.dtype)
        for name, value in result.changed.items():
            block.get_parameter(name).data = value
        return block


def measured_block(directory: Path, needs: Needs | None = None) -> MeasuredBlock:
    """Measure the first block of a checkpoint on 8 × 32 random tokens."""
    stream = stream_of(directory)
    needs = needs or Needs("gram", folds=True)
    calibration = CalibrationPass(stream, random_rows(8, 32), needs)
    batch = stream.begin(random_rows(2, 32).ids, 2)[0]
    with stream.block(0) as block:
        inputs, folds = calibration.measure(0, block)
        return MeasuredBlock(copy.deepcopy(block), inputs, folds, batch)
