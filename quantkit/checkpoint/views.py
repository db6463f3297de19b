"""Parts of stored tensors under keys of their own: one expert of a tensor that holds all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.weights import RoundsInputs


@dataclass(frozen=True)
class View:
    """Some rows of a stored tensor, or of its transpose.

    key: of the stored tensor; index: which part along its first axis, None for the whole; rows:
    which of the rows (of the transpose, where ``transposed``), all for None.
    """

    key: str
    index: int | None = None
    transposed: bool = False
    rows: slice | None = None

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the view, of a tensor of the shape ``stored``."""
        shape = stored if self.index is None else stored[1:]
        shape = shape[::-1] if self.transposed else shape
        if self.rows is None:
            return shape
        return (len(range(*self.rows.indices(shape[0]))), *shape[1:])

    def of(self, read: Callable[[str], Tensor], read_rows: Callable[..., Tensor]) -> Tensor:
        """The values, where ``read`` and ``read_rows`` give those of the stored tensor."""
        if self.index is None:
            tensor = read(self.key)
        else:
            tensor = read_rows(self.key, self.index, self.index + 1)[0]
        tensor = tensor.t() if self.transposed else tensor
        return (tensor if self.rows is None else tensor[self.rows]).contiguous()


class ViewedSource:
    """A source of weights whose keys are joined by those of ``views``. Implements ``Weights``.

    An artifact may have tensors of its own under these keys, which count then.
    """

    def __init__(self, source: Any, views: Mapping[str, View]) -> None:
        self.source = source
        own = set(source.keys())
        self.views = {key: view for key, view in views.items() if key not in own}

    @property
    def directory(self) -> Path:
        path: Path = self.source.directory
        return path

    @property
    def format(self) -> str:
        name: str = self.source.format
        return name

    @property
    def files(self) -> list[Path]:
        paths: list[Path] = self.source.files
        return paths

    def keys(self) -> Iterable[str]:
        """The source's own keys."""
        return self.source.keys()

    def quantized(self) -> Iterable[str]:
        return self.source.quantized()

    def shape(self, key: str) -> tuple[int, ...]:
        view = self.views.get(key)
        return self.source.shape(key) if view is None else view.shape(self.source.shape(view.key))

    def dtype(self, key: str) -> torch.dtype:
        view = self.views.get(key)
        return self.source.dtype(key if view is None else view.key)

    def scheme(self, key: str) -> str:
        view = self.views.get(key)
        return self.source.scheme(key if view is None else view.key)

    def stored_bytes(self, key: str) -> int:
        view = self.views.get(key)
        if view is None:
            return self.source.stored_bytes(key)
        whole = torch.Size(self.source.shape(view.key)).numel()
        return self.source.stored_bytes(view.key) * torch.Size(self.shape(key)).numel() // whole

    def parameters(self) -> int:
        return self.source.parameters()

    def read(self, key: str) -> Tensor:
        view = self.views.get(key)
        if view is None:
            return self.source.read(key)
        return view.of(self.source.read, self.source.read_rows)

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        return self.read(key)[start:stop] if key in self.views else self._rows(key, start, stop)

    def input_rounding(self, key: str) -> Callable[[Tensor], Tensor] | None:
        """What engines do to the inputs of a linear; None for nothing."""
        if key in self.views or not isinstance(self.source, RoundsInputs):
            return None
        return self.source.input_rounding(key)

    def expect(self, keys: Iterable[str]) -> None:
        """Ask the system to read these tensors into its cache, where they are plain ones."""
        if isinstance(self.source, Checkpoint):
            stored = (self.views[key].key if key in self.views else key for key in keys)
            self.source.expect(dict.fromkeys(stored))

    def _rows(self, key: str, start: int, stop: int) -> Tensor:
        return self.source.read_rows(key, start, stop)
