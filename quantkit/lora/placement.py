"""Which checkpoint key each change of the adapters belongs to, and what it does to the config.

Tied parameters share one key. Where the adapters make them differ, each gets a key of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from quantkit.base.errors import InputError
from quantkit.checkpoint.header import TensorEntry
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.views import View
from quantkit.lora.adapter import Adapter
from quantkit.lora.changes import Change
from quantkit.lora.modules import Modules
from quantkit.model.tying import set_field


class Placement:
    """The tensors of a base with adapters merged into it, as keys and shapes.

    entries: of every tensor of the result; changes: by key; within: those that are of parts of a
    tensor, by its key; sources: new key → key of the base's
    tensor that it is made from; config: of the result; untied: whether tied embeddings came apart;
    vocabulary: rows of the embeddings; resized: whether the base has another number of them.
    """

    def __init__(self, base: Checkpoint, adapters: Sequence[Adapter], modules: Modules) -> None:
        """Raises InputError for a change that doesn't fit its parameter."""
        self.entries = dict(base.entries)
        self.changes: dict[str, Change] = {}
        self.within: dict[str, list[tuple[View, Change]]] = {}
        self.sources: dict[str, str] = {}
        self.config: dict[str, Any] = dict(base.config)
        self.untied = False
        self._base = base
        self._modules = modules
        self._place(_collect(base, adapters, modules))
        self.vocabulary, self.resized = self._settle_vocabulary(adapters)

    def key(self, name: str) -> str:
        """The key of a parameter, where tied parameters may have come apart."""
        return name if name in self.sources else self._modules.names[name]

    def cast(self, dtype: torch.dtype) -> None:
        """Give every floating-point tensor of the result this dtype."""
        for key, entry in self.entries.items():
            if entry.dtype.is_floating_point:
                self.entries[key] = _with(entry, dtype=dtype)

    def _place(self, changes: dict[str, Change]) -> None:
        shared: dict[str, list[str]] = {}
        for name, key in self._modules.names.items():
            shared.setdefault(key, []).append(name)
        for key, names in shared.items():
            owner = self._modules.input if self._modules.input in names else names[0]
            if owner in changes and all(part.tokens for _, part in changes[owner].parts):
                for name in names:  # PEFT lets tied embeddings share their trained rows
                    changes.setdefault(name, changes[owner])
            changed = [name for name in names if name in changes]
            if len(changed) == len(names) and all(changes[n].same(changes[owner]) for n in names):
                self._change(key, changes[owner])
            elif changed:
                self.untied = True
                for name in names:
                    if name != owner:
                        self.sources[name] = key
                        self.entries[name] = self._base.entries[key]
                    if name in changes:
                        self._change(key if name == owner else name, changes[name])

    def _change(self, key: str, change: Change) -> None:
        self.changes[key] = change
        if (view := self._modules.views.get(key)) is not None:
            self.within.setdefault(view.key, []).append((view, change))
            return
        entry = self.entries[key]
        self.entries[key] = _with(entry, shape=change.shape_after(entry.shape))

    def _settle_vocabulary(self, adapters: Sequence[Adapter]) -> tuple[int, bool]:
        """Write into the config how many tokens there are and whether the embeddings are tied."""
        keys = {name: self.key(name) for name in self._modules.vocabulary}
        weights = {key for name, key in keys.items() if name.endswith(".weight")}
        tied = self._base.config.get("tie_word_embeddings") is not False
        if tied and len(weights) > 1 and weights & self.changes.keys():
            self.untied = True
            set_field(self.config, "tie_word_embeddings", False)
        rows = {key: self.entries[key].shape[0] for key in keys.values()}
        count = next(iter(rows.values()))
        before = {key: self._base.shape(self.sources.get(key, key))[0] for key in rows}
        if rows == before:
            return count, False
        if len(set(rows.values())) > 1:
            sizes = ", ".join(f"{key} {number}" for key, number in rows.items())
            raise InputError(
                f"resizes the vocabulary on one side only (rows: {sizes})",
                subject=str(adapters[0].directory),
                fix="Save it again with save_embedding_layers=True.",
            )
        set_field(self.config, "vocab_size", count)
        return count, True


def _collect(base: Checkpoint, adapters: Sequence[Adapter], modules: Modules) -> dict[str, Change]:
    """Parameter name → what all adapters do to it, checked."""
    combined = None
    if len(adapters) > 1:
        first = adapters[0].lora
        combined = math.sqrt(first.largest_rank()) if first.rslora else 1.0
    changes: dict[str, Change] = {}
    for adapter in adapters:
        for name, part in adapter.parts.items():
            module = name.rpartition(".")[0]
            empty = Change(module, module in modules.conv1d, combined, [])
            changes.setdefault(name, empty).parts.append((adapter, part))
    for name, change in changes.items():
        shape = modules.shape(base, name)
        after = change.shape_after(shape)
        if after != shape and name not in modules.vocabulary:
            raise InputError(
                f"{name} has {after[0]} rows, the base's tensor {shape[0]}",
                where=str(change.parts[0][0].directory),
                fix="It was trained for another base.",
            )
    return changes


def _with(
    entry: TensorEntry, *, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None
) -> TensorEntry:
    shape, dtype = shape or entry.shape, dtype or entry.dtype
    nbytes = math.prod(shape) * dtype.itemsize
    return dataclasses.replace(entry, shape=shape, dtype=dtype, nbytes=nbytes)
