"""The modules that an architecture is described by, and the sizes that their shapes are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from quantkit.formats.gguf.transforms import Keep, Transform

Config = Mapping[str, Any]

MOST_EXPERTS = 512  # LLAMA_MAX_EXPERTS


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
    ``when``: whether a config's model has it. ``split``: the tensors that GGUF makes of it, by
    their names after the layer's number, each with its change. Routed experts have a star in
    ``name`` for the number of each, and how many they are first in ``shape``: GGUF has them as one
    stack.
    """

    name: str
    shape: tuple[Width, ...]
    bias: bool | str = False
    change: Change = keep
    kind: str = ""
    stored: str = ""
    bare: bool = False
    when: Callable[[Config], bool] = lambda config: True
    split: tuple[tuple[str, Change], ...] = ()

    def tensors(self, config: Config) -> tuple[str, ...]:
        """The ends of the names of its tensors in the checkpoint."""
        if not self.when(config):
            return ()
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
    """A tensor that a config asks for.

    ``key``, ``shape``: in the checkpoint; ``name``: in GGUF; ``experts``: the keys of those that it
    is a stack of.
    """

    key: str
    name: str
    shape: tuple[int, ...]
    transform: Transform
    experts: tuple[str, ...] = ()

    def renamed(self, keys: Mapping[str, str]) -> CheckpointTensor:
        """With the keys that a checkpoint has for them."""
        experts = tuple(keys.get(key, key) for key in self.experts)
        return replace(self, key=keys.get(self.key, self.key), experts=experts)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor of the checkpoint that it is made of, by key."""
        if self.experts:
            return dict.fromkeys(self.experts, self.shape[1:])
        return {self.key: self.shape}

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in GGUF, as torch would have it."""
        return tuple(self.transform.apply(torch.empty(self.shape, device="meta")).shape)


def impossible_experts(values: Mapping[str, Any]) -> str | None:
    """What of a file's keys llama.cpp would end the process for."""
    count, used = values.get("expert_count", 0), values.get("expert_used_count", 0)
    groups, chosen = values.get("expert_group_count", 0), values.get("expert_group_used_count", 0)
    if not count:
        return None
    if not 0 < used <= count <= MOST_EXPERTS:
        return f"{used} of {count} experts for a token"
    fitting = count % groups == 0 and 0 < chosen < groups if groups > 1 else True
    if groups >= count or not fitting:
        return f"{chosen} of {groups} groups of {count} experts"
    return None
