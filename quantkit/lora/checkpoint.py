"""A checkpoint that reads as if adapters were part of it: LoRA is a way of reading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantkit.base.errors import InputError
from quantkit.base.names import dtype_name
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.sidecars import Sidecars, brings_tokenizer, tokens_of, write_config
from quantkit.checkpoint.source import folder_name
from quantkit.checkpoint.views import View
from quantkit.lora.adapter import Adapter
from quantkit.lora.changes import Factors
from quantkit.lora.checks import (
    check_base_name,
    check_combination,
    check_effect,
    check_keys,
    check_targets,
)
from quantkit.lora.modules import Modules
from quantkit.lora.parameters import separate
from quantkit.lora.placement import Placement
from quantkit.model.tying import set_field

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class AdaptedCheckpoint(Checkpoint):
    """A checkpoint with adapters folded in as its tensors are read. Implements ``Weights``.

    config: the base's, with the vocabulary size, dtype and tying that the adapters give it;
    warnings: signs that an adapter doesn't belong to the base, one sentence each; untied: whether
    tied embeddings came apart; vocabulary: rows of the embeddings, and resized: whether the base
    has another number of them.
    """

    def __init__(
        self,
        base: Checkpoint,
        adapters: Sequence[Adapter],
        names: Mapping[str, str],
        model: PreTrainedModel,
        *,
        views: Mapping[str, View] | None = None,
        dtype: torch.dtype | None = None,
        base_name: str | None = None,
        strict: bool = False,
    ) -> None:
        """Find the parameter that each tensor of the adapters changes.

        names: parameter name → key of ``base``; model: the base's modules, whose parameters may
        be on the meta device; views: keys that stand for a part of a tensor of ``base``; dtype: of
        every floating-point tensor read (default: as in the base); base_name: what the base is
        called (default: its directory's name). Several adapters are combined as PEFT's
        ``add_weighted_adapter(combination_type="linear")`` does.

        Raises InputError when a tensor of an adapter has no parameter or doesn't fit, when
        adapters can't be combined or one changes nothing, and with ``strict`` where there would be
        a warning.
        """
        self.base = base
        self.adapters = list(adapters)
        self.directory, self.files, self.format = base.directory, base.files, base.format
        self._modules = Modules(model, names, views)
        self.warnings = self._check(base_name or folder_name(base.directory))
        placement = Placement(base, self.adapters, self._modules)
        for adapter in self.adapters:
            self.warnings += check_effect(adapter, base, self._modules)
        if strict and self.warnings:
            raise InputError(self.warnings[0], where=str(self.adapters[0].directory))
        self._placement = placement
        self.entries, self.config = placement.entries, placement.config
        self.untied = placement.untied
        self.vocabulary, self.resized = placement.vocabulary, placement.resized
        if dtype is None and not {"dtype", "torch_dtype"} & self.config.keys():
            self.config["dtype"] = dtype_name(self.dtype(names[self._modules.input]))
        if dtype is not None:
            set_field(self.config, "dtype", dtype_name(dtype))
            placement.cast(dtype)
        self._whole: tuple[str, Tensor] | None = None
        self._linked: TemporaryDirectory[str] | None = None
        self._check_tokens()

    def _check(self, base_name: str) -> list[str]:
        warnings = []
        for adapter in self.adapters:
            separate(adapter, self._modules)
            adapter.resolve(self._modules.find)
            adapter.check_ranks()
            warnings += check_keys(adapter)
        if len(self.adapters) > 1 or any(adapter.weight != 1 for adapter in self.adapters):
            warnings += check_combination(self.adapters)
        for adapter in self.adapters:
            warnings += check_targets(adapter, self.base, self._modules)
            warnings += check_base_name(adapter, self.base, base_name)
        return warnings

    def _check_tokens(self) -> None:
        """Raise InputError where the tokenizer has more tokens than the embedding has rows."""
        files = self.sidecars.files
        path = files.get("tokenizer.json")
        # Some bases have more tokens than rows. That is theirs; an adapter mustn't make it so.
        if path is None or not (self.resized or path.parent != self.directory):
            return
        if (count := tokens_of(path)) > self.vocabulary:
            raise InputError(
                f"the tokenizer has {count} tokens, and the model with the adapter has an "
                f"embedding of only {self.vocabulary} rows",
                where=str(path.parent),
                fix="Put the tokenizer that the adapter was trained with into its directory, or "
                "save the adapter with save_embedding_layers=True.",
            )

    @property
    def changed(self) -> list[str]:
        """Keys of the tensors that the adapters change."""
        changed = [key for key in self._placement.changes if key in self.entries]
        return [*changed, *self._placement.within]

    @property
    def sidecars(self) -> Sidecars:
        """The files beside the weights: the base's, with the first tokenizer of an adapter."""
        directories = (adapter.directory for adapter in self.adapters)
        brings = next((path for path in directories if brings_tokenizer(path)), None)
        return Sidecars.of(self.directory, brings)

    @property
    def tokenizer(self) -> Path:
        """A directory with the sidecars: the base's own where no adapter brings any.

        Another one is there as long as this checkpoint is.
        """
        sidecars = self.sidecars
        if sidecars == Sidecars.of(self.directory):
            return self.directory
        if self._linked is None:
            self._linked = TemporaryDirectory(prefix="quantkit-")
            # Messages have its name, which no file system finds too long.
            names = (self.adapters[0].name, folder_name(self.directory))
            target = Path(self._linked.name, "-on-".join(name[:30] for name in names))
            target.mkdir()
            sidecars.copy(target, link=True)
            write_config(target, self.config, None)
        return next(Path(self._linked.name).iterdir())

    def read(self, key: str) -> Tensor:
        """One tensor with the adapters in it, cast once to the dtype of its entry.

        Raises InputError where they make it NaN or infinite.
        """
        tensor = self._read(key, self.entries[key].dtype)
        touched = key in self._placement.changes or key in self._placement.within
        if touched and not _finite(tensor):
            raise InputError(
                f"holds NaN or infinity once the adapter is merged (as {tensor.dtype})",
                subject=key,
                fix="The adapter or the base is damaged, or --dtype is too narrow for it.",
            )
        return tensor

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        """``read(key)[start:stop]``."""
        if key in self._placement.within:
            return self._read_rows_within(key, start, stop, self.entries[key].dtype)
        if key not in self._placement.changes and key in self.base.entries:
            return self.base.read_rows(key, start, stop).to(self.entries[key].dtype)
        # An embedding is read slice by slice: it is merged once, and kept for the next slice.
        whole = self._whole  # another thread may read another one
        if whole is None or whole[0] != key:
            whole = self._whole = (key, self.read(key))
        return whole[1][start:stop]

    def read_float32(self, key: str) -> Tensor:
        """One tensor with the adapters in it, before the cast to its dtype."""
        return self._read(key, torch.float32)

    def read_unmerged(self, key: str) -> Tensor:
        """In float32, with what the adapters replace but without what they add."""
        return self._read(key, torch.float32, add=False)

    def touches(self, name: str) -> bool:
        """Whether the adapters change the parameter of this name."""
        return name in self._modules.names and self.key(name) in self._placement.changes

    def key(self, name: str) -> str:
        """The key of a parameter here, where tied parameters may have come apart."""
        return self._placement.key(name)

    def factors(self, name: str) -> Factors | None:
        """What is added to the weight of this parameter name, if anything."""
        change = self._placement.changes.get(self.key(name))
        return None if change is None else change.factors()

    def added(self, name: str) -> Tensor | None:
        """What is added to the bias of this parameter name, if anything: (out,) float32."""
        change = self._placement.changes.get(self.key(name))
        return None if change is None else change.added()

    def trained_tokens(self) -> list[int]:
        """Rows of the embeddings that the adapters replace one by one."""
        rows = (r for a in self.adapters for trained in a.lora.tokens.values() for r in trained)
        return sorted(set(rows))

    def _read(self, key: str, dtype: torch.dtype, *, add: bool = True) -> Tensor:
        placement = self._placement
        if key in placement.within:
            return self._read_rows_within(key, 0, self.entries[key].shape[0], dtype, add=add)
        if (view := self._modules.views.get(key)) is not None:
            whole = partial(self._read_rows_within, dtype=dtype, add=add)
            return view.of(lambda stored: whole(stored, 0, self.entries[stored].shape[0]), whole)
        tensor = self.base.read(placement.sources.get(key, key))
        change = placement.changes.get(key)
        if not tensor.is_floating_point():
            return tensor
        return tensor.to(dtype) if change is None else change.applied(tensor, dtype, add=add)

    def _read_rows_within(
        self, key: str, start: int, stop: int, dtype: torch.dtype, *, add: bool = True
    ) -> Tensor:
        """Some rows of a tensor with parts that are changed by themselves."""
        changes = self._placement.within.get(key, [])
        if any(view.index is None for view, _ in changes):  # its rows are none of the tensor's
            first, last = 0, self.entries[key].shape[0]
        else:
            first, last = start, stop
        stored = self.base.read_rows(key, first, last)
        result = stored.to(dtype)
        for view, change in changes:
            if view.index is None or first <= view.index < last:
                own, place = _part(stored, view, first), _part(result, view, first)
                place.copy_(change.applied(own.contiguous(), dtype, add=add))
        return result[start - first : stop - first]


def _part(tensor: Tensor, view: View, first: int) -> Tensor:
    """What ``view`` is of, in the memory of ``tensor``, whose first row is number ``first``."""
    part = tensor if view.index is None else tensor[view.index - first]
    part = part.t() if view.transposed else part
    return part if view.rows is None else part[view.rows]


def _finite(tensor: Tensor) -> bool:
    """Whether there is no NaN and no infinity."""
    # The sum is cheap and nearly always finite; finite values may overflow it, though.
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())
