"""What is measured of a block's linears while the calibration rows pass through it.

All linears that read the same tensor share one measurement: q, k and v; gate and up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from quantkit.base.parallel import bfloat16_products, multiplies_bfloat16

Kind = Literal["gram", "diagonal"]
_PANEL = 256  # rows of a Gram matrix that are summed together
_TOKENS = 1024  # taken in at once
_LISTENED = 8  # one in so many tokens is listened to for the size of the outputs


class Moment(Protocol):
    """A second moment of an input, summed over tokens in float32."""

    def add(self, rows: Tensor) -> None:
        """Take in ``rows`` (tokens, width), of any float dtype."""
        ...

    def diagonal(self) -> Tensor:
        """Sum of each feature's squares, (width,)."""
        ...

    def matrix(self, order: Tensor | None = None) -> Tensor:
        """XᵀX, (width, width), its rows and columns in ``order`` (width,).

        Raises TypeError where only the diagonal was summed.
        """
        ...

    def parts(self) -> list[Tensor]:
        """The tensors that make it up, in a fixed order."""
        ...


class Diagonal:
    """The diagonal of XᵀX alone: llama.cpp's importance."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._sums = torch.zeros(width, device=device)

    def add(self, rows: Tensor) -> None:
        exact = rows.dtype == torch.bfloat16
        with bfloat16_products(rows.device) if exact else nullcontext():
            for part in rows.split(_TOKENS):
                self._take(part.float())

    def _take(self, rows: Tensor) -> None:
        self._sums += rows.square().sum(0)

    def diagonal(self) -> Tensor:
        return self._sums

    def matrix(self, order: Tensor | None = None) -> Tensor:
        raise TypeError("only the diagonal was measured")

    def parts(self) -> list[Tensor]:
        return [self._sums]


class Gram(Diagonal):
    """XᵀX, of which only what lies on and right of the diagonal is summed, in panels of rows.

    The diagonal is summed once more as ``Diagonal`` does it, so that importance weights are the
    same to the last bit wherever they come from.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__(width, device)
        self._panels = [
            torch.zeros(min(_PANEL, width - first), width - first, device=device)
            for first in range(0, width, _PANEL)
        ]

    def _take(self, rows: Tensor) -> None:
        super()._take(rows)
        for panel in self._panels:
            right = rows[:, -panel.shape[1] :]
            panel.addmm_(right[:, : len(panel)].t(), right)

    def matrix(self, order: Tensor | None = None) -> Tensor:
        # Row by row of panels, so that beside the result nothing of its size is needed.
        width = self._panels[0].shape[1]
        result = self._sums.new_empty(width, width)
        order = torch.arange(width, device=result.device) if order is None else order
        places = torch.argsort(order)
        for first, panel in zip(range(0, width, _PANEL), self._panels, strict=True):
            last = first + len(panel)
            rows = self._sums.new_empty(len(panel), width)
            rows[:, first:] = panel
            for start, above in zip(range(0, last, _PANEL), self._panels, strict=False):
                rows[:, start : start + len(above)] = above[:, first - start : last - start].t()
            result[places[first:last]] = rows.index_select(1, order)
        return result

    def parts(self) -> list[Tensor]:
        return [self._sums, *self._panels]


class Drift:
    """(X - Y)ᵀ Y (width, width) of two tensors of one shape, summed over tokens in float32."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._sum = torch.zeros(width, width, device=device)

    def add(self, left: Tensor, right: Tensor) -> None:
        """Take in rows (tokens, width) of X and of Y; their difference is of their dtype."""
        exact = left.dtype == torch.bfloat16
        with bfloat16_products(left.device) if exact else nullcontext():
            for x, y in zip(left.split(_TOKENS), right.split(_TOKENS), strict=True):
                apart, y = (x - y).float(), y.float()
                for first in range(0, len(self._sum), _PANEL):
                    rows = slice(first, first + _PANEL)
                    self._sum[rows].addmm_(apart[:, rows].t(), y)

    def matrix(self) -> Tensor:
        """The sum, in bfloat16 where products of that are fast: eight bits of so small a
        correction are plenty."""
        fast = multiplies_bfloat16(self._sum.device)
        return self._sum.to(torch.bfloat16) if fast else self._sum


def new_moment(kind: Kind, width: int, device: torch.device) -> Moment:
    """A moment of ``kind`` with nothing in it yet."""
    return Gram(width, device) if kind == "gram" else Diagonal(width, device)


@dataclass
class InputStatistics:
    """One tensor that linears of a block read.

    consumers: names of the linears within the block, in order of execution; width: features;
    moment: summed over ``tokens`` tokens; energy: each consumer's squared output without its
    bias, summed over features and tokens (by a sample of them), a float64 number on the device;
    drift: (X - Y)ᵀ Y, in float32 or bfloat16, with X what the unquantized model reads, where
    ``moment`` is of what the quantized one does, Y (``propagate: corrected``).
    """

    consumers: list[str]
    width: int
    moment: Moment
    tokens: int = 0
    energy: dict[str, Tensor] = field(default_factory=dict)
    drift: Tensor | None = None

    def importance(self) -> Tensor:
        """Mean square of each input feature, (width,)."""
        return self.moment.diagonal() / self.tokens


class Meter:
    """Measures the inputs of ``linears`` in every forward of their block.

    ``inputs`` are the distinct tensors read, in order of execution. Linears that are never
    called are in none. new: makes the moment of an input of some width.
    """

    def __init__(
        self, linears: dict[str, nn.Linear], new: Callable[[int, torch.device], Moment]
    ) -> None:
        self.inputs: list[InputStatistics] = []
        self._new = new
        self._linears = linears
        self._owner: dict[str, InputStatistics] = {}
        # Tensors read during the forward under way: holding them keeps their addresses unique.
        self._seen: list[tuple[Tensor, InputStatistics]] = []

    @contextmanager
    def watching(self) -> Iterator[Callable[[], None]]:
        """Measure inside the block; call what is given after each forward."""
        handles = [
            linear.register_forward_hook(self._hook(name)) for name, linear in self._linears.items()
        ]
        try:
            yield self._seen.clear
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def measure(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            tensor: Tensor = args[0]
            group = self._owner.get(name)
            if group is None:  # the first forward: find out who reads what
                group = self._find(tensor)
                group.consumers.append(name)
                self._owner[name] = group
            if group.consumers[0] == name:
                rows = tensor.detach().reshape(-1, group.width)
                group.moment.add(rows)
                group.tokens += rows.shape[0]
            bias = getattr(module, "bias", None)
            values = output.reshape(-1, output.shape[-1])[::_LISTENED]
            values = values if bias is None else values - bias
            norms = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)
            found = norms.double().square_().mean() * (output.numel() // output.shape[-1])
            group.energy[name] = found + group.energy[name] if name in group.energy else found

        return measure

    def _find(self, tensor: Tensor) -> InputStatistics:
        for other, group in self._seen:
            if (
                other.data_ptr() == tensor.data_ptr()
                and other.shape == tensor.shape
                and other.stride() == tensor.stride()
            ):
                return group
        width = tensor.shape[-1]
        group = InputStatistics([], width, self._new(width, tensor.device))
        self.inputs.append(group)
        self._seen.append((tensor, group))
        return group
