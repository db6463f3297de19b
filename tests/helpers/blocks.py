"""The first decoder block of a tiny model, calibrated."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from quantkit.calibration.folds import Fold
from quantkit.calibration.needs import Needs
from quantkit.calibration.passing import CalibrationPass
from quantkit.calibration.statistics import InputStatistics
from quantkit.calibration.text import Rows
from quantkit.checkpoint.reader import Checkpoint
from quantkit.model.skeleton import Skeleton
from quantkit.model.stream import Batch, Stream


def random_rows(count: int = 8, length: int = 32) -> Rows:
    """Seeded random token ids of the tiny models' vocabulary."""
    ids = torch.randint(0, 96, (count, length), generator=torch.Generator().manual_seed(5))
    return Rows(ids, "", count)


def first_block(
    directory: Path, *, folds: bool = True
) -> tuple[Any, list[InputStatistics], list[Fold], Batch]:
    """Block 0 in float32, the statistics of its inputs, its folds, and a batch before it."""
    checkpoint = Checkpoint(directory)
    stream = Stream(Skeleton(checkpoint), checkpoint, torch.device("cpu"))
    calibration = CalibrationPass(stream, random_rows(), Needs("gram", folds=folds))
    before = stream.begin(random_rows(2).ids, 2)[0]
    with stream.block(0) as block:
        inputs, proven = calibration.through(0, block)
        block = copy.deepcopy(block)
    return block, inputs, proven, before
