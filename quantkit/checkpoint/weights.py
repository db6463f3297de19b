"""What a source of weights can do, whatever it is stored as."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch


class TensorSource(Protocol):
    """Weights by their checkpoint key, whatever they are stored as."""

    def keys(self) -> Iterable[str]: ...

    def read(self, key: str) -> torch.Tensor: ...

    def read_rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        """``read(key)[start:stop]``, without the rest where the storage allows it."""
        ...


@runtime_checkable
class RoundsInputs(Protocol):
    """A source whose engines round what some linears read, not only their weights."""

    def input_rounding(self, key: str) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What happens to the inputs of the linear whose weight is ``key``; None for nothing."""
        ...


class Weights(TensorSource, Protocol):
    """All weights of a model on disk, in whatever format.

    directory: where they lie; format: what they are stored as; files: what they are stored in.
    """

    @property
    def directory(self) -> Path: ...

    format: str
    files: list[Path]

    def quantized(self) -> Iterable[str]:
        """The keys whose weights are rounded to something coarser than a float."""
        ...

    def shape(self, key: str) -> tuple[int, ...]: ...

    def scheme(self, key: str) -> str:
        """What a weight is rounded to, such as ``int4 g128 sym`` or ``Q4_K``, or its dtype."""
        ...

    def stored_bytes(self, key: str) -> int:
        """Bytes of everything that stands for a weight."""
        ...

    def parameters(self) -> int:
        """Number of weights they stand for."""
        ...
