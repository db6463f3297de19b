"""Protocols of a model's weights, however they are stored: plain, packed, as GGUF, or adapted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch


class TensorSource(Protocol):
    """Weights by their checkpoint key."""

    def keys(self) -> Iterable[str]: ...

    def read(self, key: str) -> torch.Tensor:
        """The whole tensor as floats (or as integers, if the model has them so), on the CPU."""
        ...

    def read_rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        """``read(key)[start:stop]``, read without the other rows where the storage allows it."""
        ...


@runtime_checkable
class RoundsInputs(Protocol):
    """A source whose engines round the inputs of some linears, not only their weights."""

    def input_rounding(self, key: str) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """The function that rounds the inputs of the linear whose weight is ``key``, or None."""
        ...


class Weights(TensorSource, Protocol):
    """All weights of a model on disk.

    directory: of the model; format: such as ``safetensors``, ``gptq`` or ``gguf``; files: that hold
    the weights.
    """

    @property
    def directory(self) -> Path: ...

    format: str
    files: list[Path]

    def quantized(self) -> Iterable[str]:
        """The keys of the weights that are quantized."""
        ...

    def shape(self, key: str) -> tuple[int, ...]: ...

    def scheme(self, key: str) -> str:
        """What a weight is quantized to, such as ``int4 g128 sym`` or ``Q4_K``, or its dtype."""
        ...

    def stored_bytes(self, key: str) -> int:
        """Bytes that a weight takes on disk, with its scales and zero points."""
        ...

    def parameters(self) -> int:
        """Number of weights, counted as in the unquantized model."""
        ...
