"""Statistics of what a block's linears read, summed while the calibration rows pass through it.

All linears that read the same tensor share them: q_proj, k_proj and v_proj; gate_proj and up_proj.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from quantkit.base.parallel import bfloat16_products, multiplies_bfloat16

Kind = Literal["gram", "diagonal"]
# Rows of a Gram matrix that are summed together: few save most products, many are few launches.
_PANEL, _PANEL_ON_GPU = 256, 4096
_TOKENS = 1024  # added at once: that many are copied to float32 at a time
_SHORT = (torch.bfloat16, torch.float16)  # dtypes whose products float32 holds exactly
_ENERGY_STRIDE = 8  # the size of the outputs is estimated on every eighth token


class Moment(Protocol):
    """A second moment of an input X (tokens, width), summed over tokens in float32."""

    def add(self, rows: Tensor) -> None:
        """Add the rows (tokens, width) of further tokens, of any float dtype."""
        ...

    def diagonal(self) -> Tensor:
        """Sum of each feature's squares, (width,)."""
        ...

    def matrix(self, order: Tensor | None = None) -> Tensor:
        """XᵀX (width, width), with its rows and columns in ``order`` (width,) int64.

        Raises TypeError where only the diagonal was summed.
        """
        ...

    def parts(self) -> list[Tensor]:
        """The tensors that hold the sums, in a fixed order."""
        ...


class Diagonal:
    """The diagonal of XᵀX alone, which is llama.cpp's importance matrix."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._sums = torch.zeros(width, device=device)

    def add(self, rows: Tensor) -> None:
        if rows.device.type != "cpu" and rows.dtype in _SHORT:
            self._add_short(rows)
            return
        # Rows of bfloat16 are still values of bfloat16 after the copy to float32: their products
        # are the same in the faster units.
        exact = rows.dtype == torch.bfloat16
        with bfloat16_products(rows.device) if exact else nullcontext():
            for part in rows.split(_TOKENS):
                self._add_part(part.float())

    def _add_part(self, rows: Tensor) -> None:
        self._sums += rows.square().sum(0)

    def _add_short(self, rows: Tensor) -> None:
        """Add rows of a short dtype on a GPU, without a copy in float32."""
        norms = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32)
        self._sums += norms.square_()

    def diagonal(self) -> Tensor:
        return self._sums

    def matrix(self, order: Tensor | None = None) -> Tensor:
        raise TypeError("only the diagonal was measured")

    def parts(self) -> list[Tensor]:
        return [self._sums]


class Gram(Diagonal):
    """The Gram matrix XᵀX: half of the hessian of the squared output error."""

    def __init__(self, width: int, device: torch.device) -> None:
        # The diagonal is summed by itself too, so that importance weights are the same to the last
        # bit whether they come from a Gram matrix or from a ``Diagonal``.
        super().__init__(width, device)
        # XᵀX is symmetric: panels of rows, each from its part of the diagonal to the right, are
        # little more than half of the products and of the memory.
        self._height = _PANEL if device.type == "cpu" else _PANEL_ON_GPU
        self._panels = [
            torch.zeros(min(self._height, width - first), width - first, device=device)
            for first in range(0, width, self._height)
        ]

    def _add_part(self, rows: Tensor) -> None:
        super()._add_part(rows)
        for panel in self._panels:
            right = rows[:, -panel.shape[1] :]
            panel.addmm_(right[:, : len(panel)].t(), right)

    def _add_short(self, rows: Tensor) -> None:
        super()._add_short(rows)
        for panel in self._panels:
            right = rows[:, -panel.shape[1] :]
            _add_product(panel, right[:, : len(panel)], right)

    def matrix(self, order: Tensor | None = None) -> Tensor:
        # One panel's rows at a time, so that nothing of the result's size is needed beside it.
        width = self._panels[0].shape[1]
        result = self._sums.new_empty(width, width)
        order = torch.arange(width, device=result.device) if order is None else order
        places = torch.argsort(order)  # where each feature goes in the result
        for first, panel in zip(range(0, width, self._height), self._panels, strict=True):
            last = first + len(panel)
            rows = self._sums.new_empty(len(panel), width)
            rows[:, first:] = panel
            for start, above in zip(range(0, last, self._height), self._panels, strict=False):
                rows[:, start : start + len(above)] = above[:, first - start : last - start].t()
            result[places[first:last]] = rows.index_select(1, order)
        return result

    def parts(self) -> list[Tensor]:
        return [self._sums, *self._panels]


class _Reordered:
    """A moment that is summed up, of the features in another order."""

    def __init__(self, moment: Moment, order: Tensor) -> None:
        self._moment, self._order = moment, order

    def add(self, rows: Tensor) -> None:
        raise TypeError("no more rows can be added")

    def diagonal(self) -> Tensor:
        return self._moment.diagonal()[self._order]

    def matrix(self, order: Tensor | None = None) -> Tensor:
        return self._moment.matrix(self._order if order is None else self._order[order])

    def parts(self) -> list[Tensor]:
        return self._moment.parts()


class Drift:
    """(X - Y)ᵀ Y (width, width), summed over tokens in float32.

    X (tokens, width) is what the unquantized model reads, and Y what the quantized one reads.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self._sum = torch.zeros(width, width, device=device)

    def add(self, original: Tensor, quantized: Tensor) -> None:
        """Add the rows (tokens, width) of X and of Y for the same tokens, of one float dtype."""
        if original.device.type != "cpu" and original.dtype in _SHORT:
            _add_product(self._sum, original - quantized, quantized)
            return
        exact = original.dtype == torch.bfloat16
        with bfloat16_products(original.device) if exact else nullcontext():
            for x, y in zip(original.split(_TOKENS), quantized.split(_TOKENS), strict=True):
                # The difference is rounded to the dtype of the rows, for the faster units.
                difference, y = (x - y).float(), y.float()
                for first in range(0, len(self._sum), _PANEL):
                    rows = slice(first, first + _PANEL)
                    self._sum[rows].addmm_(difference[:, rows].t(), y)

    def matrix(self) -> Tensor:
        """The sum, in bfloat16 where products of bfloat16 are fast, else in float32."""
        # Eight bits of so small a correction are enough: the result is as good with bfloat16
        # (docs/quality.md, "Drifted inputs").
        fast = multiplies_bfloat16(self._sum.device)
        return self._sum.to(torch.bfloat16) if fast else self._sum


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add leftᵀ right, of (tokens, …) in a short dtype on a GPU, to ``total`` in float32."""
    # Tensor cores multiply short numbers exactly, and sum in float32.
    torch.addmm(total, left.t(), right, out_dtype=total.dtype, out=total)


def new_moment(kind: Kind, width: int, device: torch.device) -> Moment:
    """A moment of ``kind`` over no tokens."""
    return Gram(width, device) if kind == "gram" else Diagonal(width, device)


@dataclass
class InputStatistics:
    """Statistics of one tensor that linears of a block read.

    consumers: names of these linears within the block, in order of execution; width: features of
    the tensor; moment: summed over ``tokens`` tokens; energy: by consumer, the sum of its squared
    outputs without its bias, over features and tokens (estimated on a sample of tokens), a float64
    scalar on the device.

    drift: (X - Y)ᵀ Y (width, width), float32 or bfloat16, with ``propagate: corrected``, else None.
    Then ``moment`` is that of Y, which the quantized model reads.
    routed: by consumer, how many tokens were routed to its expert, empty where no expert reads it;
    there are more ``tokens`` where these were too few, so that it was measured on all, together
    with every other expert of the kind.
    """

    consumers: list[str]
    width: int
    moment: Moment
    tokens: int = 0
    energy: dict[str, Tensor] = field(default_factory=dict)
    drift: Tensor | None = None
    routed: dict[str, int] = field(default_factory=dict)

    def importance(self) -> Tensor:
        """Mean square of each input feature, (width,)."""
        return self.moment.diagonal() / self.tokens

    def reordered(self, order: Tensor) -> InputStatistics:
        """The same of the features in ``order`` (width,) int64."""
        order = order.to(self.moment.diagonal().device)
        drift = None if self.drift is None else self.drift[order][:, order]
        return replace(self, moment=_Reordered(self.moment, order), drift=drift)


class Meter:
    """Measures the inputs of ``linears``, named within their block, in every forward of the block.

    new: makes the moment of an input, from its width and device; inputs: statistics of the
    distinct tensors that linears read, in order of execution. A linear that is never called is a
    consumer of none.
    """

    def __init__(
        self, linears: dict[str, nn.Linear], new: Callable[[int, torch.device], Moment]
    ) -> None:
        self.inputs: list[InputStatistics] = []
        self._new = new
        self._linears = linears
        self._owner: dict[str, InputStatistics] = {}
        # The tensors read in the current forward. While they are held, no other tensor gets the
        # address of one of them.
        self._seen: list[tuple[Tensor, InputStatistics]] = []

    @contextmanager
    def watching(self) -> Iterator[Callable[[], None]]:
        """Measure inside the ``with`` block; call the given function after each forward."""
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
            if group is None:  # in the first forward
                group = self._group_of(tensor)
                group.consumers.append(name)
                self._owner[name] = group
            # The tensor is added once in each forward, by the first linear that reads it.
            if group.consumers[0] == name:
                rows = tensor.detach().reshape(-1, group.width)
                group.moment.add(rows)
                group.tokens += rows.shape[0]
            # The energy is what reports divide errors by: its size is enough, and a sample of the
            # tokens gives that for an eighth of the time.
            bias = getattr(module, "bias", None)
            values = output.reshape(-1, output.shape[-1])[::_ENERGY_STRIDE]
            values = values if bias is None else values - bias
            norms = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)
            energy = norms.double().square_().mean() * (output.numel() // output.shape[-1])
            group.energy[name] = energy + group.energy[name] if name in group.energy else energy

        return measure

    def _group_of(self, tensor: Tensor) -> InputStatistics:
        """The statistics of a tensor, new ones where no linear has read it in this forward."""
        # The same memory seen in the same way: a slice of it is another input.
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
