"""What llama.cpp changes in a tensor before it is stored, and how to undo it.

A transform works on the rows of one checkpoint tensor and leaves its columns where they are, so
importance weights of input features hold for the stored tensor as well; but for ``TileColumns``,
whose order the weights must follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Transform(Protocol):
    """One change of a tensor, weight or bias, of any float dtype.

    ``rows``: a slice of the checkpoint's rows can be transformed by itself when it begins and
    ends at a multiple of this number; None: only the whole tensor can.
    """

    @property
    def rows(self) -> int | None: ...

    def apply(self, tensor: Tensor) -> Tensor:
        """The checkpoint's tensor as it is stored."""
        ...

    def undo(self, tensor: Tensor) -> Tensor:
        """The stored tensor as the checkpoint has it."""
        ...


@dataclass(frozen=True)
class Keep:
    """Stored as the checkpoint has it."""

    @property
    def rows(self) -> int:
        return 1

    def apply(self, tensor: Tensor) -> Tensor:
        return tensor

    def undo(self, tensor: Tensor) -> Tensor:
        return tensor


@dataclass(frozen=True)
class InterleaveHalves:
    """Rows of q and k: rotary pairs (j, j + half) of every head become neighbours (2j, 2j + 1).

    Some of llama.cpp's graphs rotate neighbours where Hugging Face's models rotate halves.
    """

    head_dim: int

    @property
    def rows(self) -> int:
        return self.head_dim

    def apply(self, tensor: Tensor) -> Tensor:
        return _swapped(tensor, 2, self.head_dim // 2)

    def undo(self, tensor: Tensor) -> Tensor:
        return _swapped(tensor, self.head_dim // 2, 2)


@dataclass(frozen=True)
class ThreeParts:
    """Rows of a fused q, k and v: all heads' q, then all k, then all v, instead of by head."""

    head_dim: int

    @property
    def rows(self) -> None:
        return None

    def apply(self, tensor: Tensor) -> Tensor:
        return self._regroup(tensor, tensor.shape[0] // self.head_dim // 3, 3)

    def undo(self, tensor: Tensor) -> Tensor:
        return self._regroup(tensor, 3, tensor.shape[0] // self.head_dim // 3)

    def _regroup(self, tensor: Tensor, outer: int, inner: int) -> Tensor:
        parts = tensor.reshape(outer, inner, self.head_dim, -1)
        return parts.swapaxes(0, 1).reshape(tensor.shape)


@dataclass(frozen=True)
class AddOne:
    """A norm that multiplies by 1 + w is stored as that factor, in float32."""

    @property
    def rows(self) -> int:
        return 1

    def apply(self, tensor: Tensor) -> Tensor:
        return tensor.float() + 1

    def undo(self, tensor: Tensor) -> Tensor:
        return tensor - 1


@dataclass(frozen=True)
class HeadPart:
    """Some rows of every head, in multi-head latent attention: (heads, rows, columns).

    ``heads``, ``height``: of the matrix, and the rows of a head; ``start``, ``stop``: those taken;
    ``transposed``: (heads, columns, rows) is stored, as what a head's queries are multiplied by.
    """

    heads: int
    height: int
    start: int
    stop: int
    transposed: bool = False

    @property
    def rows(self) -> None:
        return None

    def apply(self, tensor: Tensor) -> Tensor:
        part = tensor.view(self.heads, self.height, -1)[:, self.start : self.stop]
        return (part.transpose(1, 2) if self.transposed else part).contiguous()

    def undo(self, tensor: Tensor) -> Tensor:
        """The checkpoint's matrix, with zeros in the rows that aren't here."""
        part = tensor.transpose(1, 2) if self.transposed else tensor
        whole = tensor.new_zeros(self.heads, self.height, part.shape[2])
        whole[:, self.start : self.stop] = part
        return whole.view(-1, part.shape[2])


def keeps_columns(transform: Transform) -> bool:
    """Whether the stored columns are the checkpoint's, so that importance weights fit them."""
    return not (isinstance(transform, HeadPart) and transform.transposed)


@dataclass(frozen=True)
class Squeeze:
    """A convolution's kernels (channels, 1, width) without the middle. Its bias stays."""

    @property
    def rows(self) -> int:
        return 1

    def apply(self, tensor: Tensor) -> Tensor:
        return tensor.squeeze(1) if tensor.ndim == 3 else tensor

    def undo(self, tensor: Tensor) -> Tensor:
        return tensor.unsqueeze(1) if tensor.ndim == 2 else tensor


@dataclass(frozen=True)
class Columns:
    """A vector in rows of ``width``."""

    width: int

    @property
    def rows(self) -> None:
        return None

    def apply(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, self.width)

    def undo(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(-1)


@dataclass(frozen=True)
class RowPart:
    """Some rows of a matrix with ``height`` of them."""

    height: int
    start: int
    stop: int

    @property
    def rows(self) -> None:
        return None

    def apply(self, tensor: Tensor) -> Tensor:
        return tensor[self.start : self.stop]

    def undo(self, tensor: Tensor) -> Tensor:
        """The checkpoint's matrix, with zeros in the rows that aren't here."""
        whole = tensor.new_zeros(self.height, *tensor.shape[1:])
        whole[self.start : self.stop] = tensor
        return whole


@dataclass(frozen=True)
class NegativeExp:
    """The logarithm of a decay becomes the negative rate, in float32."""

    @property
    def rows(self) -> int:
        return 1

    def apply(self, tensor: Tensor) -> Tensor:
        return -tensor.float().exp()

    def undo(self, tensor: Tensor) -> Tensor:
        return (-tensor).log()


@dataclass(frozen=True)
class TileHeads:
    """Rows from ``start`` on, by head: those that share a key come to lie apart, not side by side.

    Of heads counted (groups, each), ggml repeats the keys as (each, groups).
    """

    start: int
    groups: int
    each: int
    head_dim: int

    @property
    def rows(self) -> None:
        return None

    def apply(self, tensor: Tensor) -> Tensor:
        return self._regroup(tensor, self.groups, self.each)

    def undo(self, tensor: Tensor) -> Tensor:
        return self._regroup(tensor, self.each, self.groups)

    def _regroup(self, tensor: Tensor, outer: int, inner: int) -> Tensor:
        before, heads = tensor[: self.start], tensor[self.start :]
        parts = heads.reshape(outer, inner, self.head_dim, -1).swapaxes(0, 1)
        return torch.cat([before, parts.reshape(heads.shape)])


@dataclass(frozen=True)
class TileColumns:
    """The columns of a matrix that reads such heads."""

    heads: TileHeads

    @property
    def rows(self) -> int:
        return 1

    def apply(self, tensor: Tensor) -> Tensor:
        return self.heads.apply(tensor.t()).t().contiguous()

    def undo(self, tensor: Tensor) -> Tensor:
        return self.heads.undo(tensor.t()).t().contiguous()


@dataclass(frozen=True)
class Chain:
    """One transform after the other."""

    first: Transform
    second: Transform

    @property
    def rows(self) -> None:
        return None

    def apply(self, tensor: Tensor) -> Tensor:
        return self.second.apply(self.first.apply(tensor))

    def undo(self, tensor: Tensor) -> Tensor:
        return self.first.undo(self.second.undo(tensor))


def column_order(transform: Transform, columns: int) -> Tensor | None:
    """The checkpoint's column that each stored one is (columns,), where they are reordered."""
    if not isinstance(transform, TileColumns):
        return None
    return transform.heads.apply(torch.arange(columns))


def _swapped(tensor: Tensor, outer: int, inner: int) -> Tensor:
    """Rows counted (…, outer, inner) become rows counted (…, inner, outer)."""
    rows = tensor.reshape(-1, outer, inner, tensor[0].numel())
    return rows.swapaxes(1, 2).reshape(tensor.shape)
