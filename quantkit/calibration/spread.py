"""Calibration rows spread over several devices, each with a copy of the block.

Batches are dealt out in turn. What a device measured of its batches is added to what the others
did, in the order of the devices: the same sums as on one device, in another order, so that their
last bits may differ.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.calibration.statistics import InputStatistics, Kind, new_moment
from quantkit.model.stream import Batch
from quantkit.model.stubs import Call


def moved(value: Any, device: torch.device) -> Any:
    """A layer's recorded arguments with their tensors on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Call):
        return Call(moved(value.args, device), moved(value.kwargs, device))
    if isinstance(value, dict):
        return {key: moved(part, device) for key, part in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(moved(part, device) for part in value)
    return value


class Spread:
    """Which device passes which batch, and the block's copies on them.

    devices: the first has the block itself.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.devices = list(devices)
        self._calls: dict[tuple[int, int], list[Call]] = {}

    def place(self, number: int) -> int:
        """The place in ``devices`` of the one that batch ``number`` is passed on."""
        return number % len(self.devices)

    def dealt(self, number: int, batch: Batch) -> Batch:
        """The batch on its device."""
        place = self.place(number)
        if place == 0:
            return batch
        # Nearly all batches share one copy of masks and rotations.
        key = (place, id(batch.calls))
        device = self.devices[place]
        if key not in self._calls:
            self._calls[key] = moved(batch.calls, device)
        return replace(
            batch,
            ids=batch.ids.to(device),
            hidden=batch.hidden.to(device),
            calls=self._calls[key],
        )

    def copies(self, block: nn.Module) -> list[nn.Module]:
        """The block as it is now, on each device."""
        return [block, *(copy.deepcopy(block).to(device) for device in self.devices[1:])]

    def joined(
        self, measured: Sequence[Sequence[InputStatistics]], kind: Kind, *, solve_apart: bool
    ) -> list[InputStatistics]:
        """What the devices measured, added up.

        solve_apart: leave the statistics of one input after the other on one device after the
        other, where they are used then; else all are on the first.
        """
        if len(measured) == 1:
            return list(measured[0])
        found: list[list[InputStatistics]] = []
        by_name: dict[str, list[InputStatistics]] = {}
        for groups in measured:
            for group in groups:
                known = next((by_name[n] for n in group.consumers if n in by_name), None)
                if known is None:
                    known = []
                    found.append(known)
                known.append(group)
                by_name |= dict.fromkeys(group.consumers, known)
        return [
            _sum(groups, kind, self.devices[self.place(number) if solve_apart else 0])
            for number, groups in enumerate(found)
        ]


def _sum(groups: Sequence[InputStatistics], kind: Kind, device: torch.device) -> InputStatistics:
    """Statistics of one input, measured on several devices, as one on ``device``."""
    first = groups[0]
    moment = new_moment(kind, first.width, device)
    energy: dict[str, Tensor] = {}
    for group in groups:
        for total, part in zip(moment.parts(), group.moment.parts(), strict=True):
            total.add_(part.to(device))
        for name, value in group.energy.items():
            here = value.to(device)
            energy[name] = energy[name] + here if name in energy else here
    consumers = list(dict.fromkeys(name for group in groups for name in group.consumers))
    tokens = sum(group.tokens for group in groups)
    return InputStatistics(consumers, first.width, moment, tokens, energy)
