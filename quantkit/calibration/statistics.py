"""What is measured of a block's inputs while the calibration rows pass through it.

All linears that read the same tensor share one measurement: q, k and v; gate and up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quantkit.model.stream import Batch, Stream

Kind = Literal["gram", "diagonal"]


@dataclass
class InputStatistics:
    """One tensor that linears of a block read.

    consumers: names of the linears within the block, in order of execution; width: features;
    moment: float32, the Gram matrix XᵀX (width, width) or its diagonal (width), summed over
    ``tokens`` tokens.
    """

    consumers: list[str]
    width: int
    moment: Tensor
    tokens: int = 0

    def diagonal(self) -> Tensor:
        return self.moment.diagonal() if self.moment.ndim == 2 else self.moment


def collect(
    stream: Stream,
    index: int,
    block: nn.Module,
    linears: dict[str, nn.Linear],
    batches: list[Batch],
    kind: Kind,
    step: Callable[[], None] = lambda: None,
) -> list[InputStatistics]:
    """Carry every batch through ``block`` and measure the inputs of ``linears`` on the way.

    Returns the distinct inputs in order of execution. Linears that are never called are in none.
    """
    groups: list[InputStatistics] = []
    with _hooked(linears, kind, groups) as forget:
        for batch in batches:
            batch.hidden = stream.run(index, block, batch)
            forget()
            step()
    return groups


@dataclass
class _Seen:
    """Tensors read during the forward under way. Holding them keeps their addresses unique."""

    tensors: list[tuple[Tensor, InputStatistics]] = field(default_factory=list)

    def find(self, tensor: Tensor) -> InputStatistics | None:
        for other, group in self.tensors:
            if (
                other.data_ptr() == tensor.data_ptr()
                and other.shape == tensor.shape
                and other.stride() == tensor.stride()
            ):
                return group
        return None


@contextmanager
def _hooked(
    linears: dict[str, nn.Linear], kind: Kind, groups: list[InputStatistics]
) -> Iterator[Callable[[], None]]:
    seen = _Seen()
    owner: dict[str, InputStatistics] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def measure(module: nn.Module, args: tuple[Any, ...]) -> None:
            tensor: Tensor = args[0]
            group = owner.get(name)
            if group is None:  # the first forward: find out who reads what
                group = seen.find(tensor)
                if group is None:
                    group = _new_group(tensor, kind)
                    groups.append(group)
                    seen.tensors.append((tensor, group))
                group.consumers.append(name)
                owner[name] = group
            if group.consumers[0] == name:
                _add(group, tensor)

        return measure

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    try:
        yield seen.tensors.clear
    finally:
        for handle in handles:
            handle.remove()


def _new_group(tensor: Tensor, kind: Kind) -> InputStatistics:
    width = tensor.shape[-1]
    shape = (width, width) if kind == "gram" else (width,)
    moment = torch.zeros(shape, dtype=torch.float32, device=tensor.device)
    return InputStatistics([], width, moment)


def _add(group: InputStatistics, tensor: Tensor) -> None:
    rows = tensor.detach().reshape(-1, group.width).float()
    if group.moment.ndim == 2:
        group.moment.addmm_(rows.t(), rows)
    else:
        group.moment.add_(rows.square().sum(0))
    group.tokens += rows.shape[0]
