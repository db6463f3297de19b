"""The modules that an architecture is described by, and the sizes that their shapes are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from quantkit.formats.gguf.transforms import Keep, Transform

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Dimensions:
    """The sizes that shapes are made of.

    ``own``: those that only some families have, by their GGUF key (``Architecture.sizes``).
    """

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    own: Mapping[str, int] = field(default_factory=dict)

    def size(self, width: Width) -> int:
        """A width by the word that ``Module.shape`` has for it, or by its function."""
        if not isinstance(width, str):
            return width(self)
        if width in self.own:
            return self.own[width]
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "hidden": self.hidden,
            "inner": self.inner,
            "two inner": 2 * self.inner,
            "q": q,
            "kv": kv,
            "qkv": q + 2 * kv,
            "head": self.head_dim,
            "heads": self.heads,
            "kv heads": self.kv_heads,
            "vocabulary": self.vocabulary,
        }[width]


Width = str | Callable[[Dimensions], int]
Change = Callable[[Dimensions], Transform]


def keep(dimensions: Dimensions) -> Transform:
    """Stored as the checkpoint has it."""
    return Keep()


@dataclass(frozen=True)
class Module:
    """A linear or a norm of a block, or a parameter that belongs to no such module.

    ``name``: after the layer's number in the checkpoint. ``shape``: of the weight, in the words
    of ``Dimensions.size``. ``bias``: whether it has one, or the config's key that decides it.
    ``change``: from the checkpoint's tensors to those that GGUF stores. ``kind``: of the layers
    that have it; "": all have it. ``stored``: its name after the layer's number in GGUF, where
    gguf-py's map has none. ``bare``: ``name`` and ``stored`` are those of the tensor itself.
    """

    name: str
    shape: tuple[Width, ...]
    bias: bool | str = False
    change: Change = keep
    kind: str = ""
    stored: str = ""
    bare: bool = False

    def tensors(self, config: Config) -> tuple[str, ...]:
        """The ends of the names of its tensors in the checkpoint."""
        if self.bare:
            return ("",)
        biased = config.get(self.bias) if isinstance(self.bias, str) else self.bias
        return (".weight", ".bias") if biased else (".weight",)

    def transform(self, end: str, dimensions: Dimensions) -> Transform:
        """The change of one of its tensors. A norm's bias has none."""
        added = end == ".bias" and len(self.shape) == 1
        return Keep() if added else self.change(dimensions)


def of_kind(kind: str, modules: Iterable[Module]) -> tuple[Module, ...]:
    """Modules that only layers of a kind have."""
    return tuple(replace(module, kind=kind) for module in modules)


@dataclass(frozen=True)
class CheckpointTensor:
    """A tensor that a config asks for. ``shape``: in the checkpoint."""

    key: str
    name: str  # in GGUF
    shape: tuple[int, ...]
    transform: Transform

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in GGUF, as torch would have it."""
        return tuple(self.transform.apply(torch.empty(self.shape, device="meta")).shape)
