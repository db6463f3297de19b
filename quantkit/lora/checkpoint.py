"""A checkpoint that reads as if adapters were part of it: LoRA is a way of reading."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantkit.base.errors import InputError
from quantkit.base.names import dtype_name, listed
from quantkit.checkpoint.header import TensorEntry
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.sidecars import brings_tokenizer
from quantkit.lora.adapter import Adapter
from quantkit.lora.changes import Change, Factors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class AdaptedCheckpoint(Checkpoint):
    """A checkpoint with adapters folded in as its tensors are read. Implements ``Weights``.

    config: the base's, with vocabulary size, dtype and tying as the adapters leave them;
    warnings: what may be wrong, one sentence each; untied: whether input and output embedding
    came apart; vocabulary: rows of the embeddings, and resized: whether the base has another
    number; changed: keys whose tensors the adapters touch; brings: the adapter directory whose
    tokenizer and chat template replace the base's.
    """

    def __init__(
        self,
        base: Checkpoint,
        adapters: Sequence[Adapter],
        names: Mapping[str, str],
        model: PreTrainedModel,
        *,
        dtype: torch.dtype | None = None,
        base_name: str | None = None,
        strict: bool = False,
    ) -> None:
        """Find a place for every tensor of the adapters.

        names: parameter name → key of ``base``; model: the base's modules (parameters may be on
        the meta device), asked which are its embeddings and which store (in, out); dtype: that of
        every floating-point tensor read (default: as in the base); base_name: what the base is
        called, if not as its directory. Several adapters are combined as PEFT's
        ``add_weighted_adapter(combination_type="linear")`` does.

        Raises InputError when a tensor of an adapter has no place or doesn't fit, when adapters
        can't be combined, and with ``strict`` where there would be a warning.
        """
        self.base = base
        self.adapters = list(adapters)
        self.directory, self.files, self.format = base.directory, base.files, base.format
        self.config: dict[str, Any] = dict(base.config)
        self.entries = dict(base.entries)
        self.untied = False
        self.vocabulary, self.resized = 0, False
        self.warnings: list[str] = []
        self._model = _Model(model, names)
        self._sources: dict[str, str] = {}  # new key → key of the base's tensor
        self._changes: dict[str, Change] = {}
        self._whole: tuple[str, Tensor] | None = None
        if len(self.adapters) > 1 or any(adapter.weight != 1 for adapter in self.adapters):
            self._check_combination()
        for adapter in self.adapters:
            self._check_targets(adapter)
            self._check_base(adapter, base_name or base.directory.name)
        if strict and self.warnings:
            raise InputError(self.warnings[0], where=str(self.adapters[0].directory))
        self._place(self._collect())
        self._settle_vocabulary()
        if dtype is None and not {"dtype", "torch_dtype"} & self.config.keys():
            self.config["dtype"] = dtype_name(self.dtype(names[self._model.input]))
        if dtype is not None:
            _set(self.config, "dtype", dtype_name(dtype))
            for key, entry in self.entries.items():
                if entry.dtype.is_floating_point:
                    self.entries[key] = _with(entry, dtype=dtype)

    @property
    def changed(self) -> list[str]:
        return list(self._changes)

    @property
    def brings(self) -> Path | None:
        found = [a.directory for a in self.adapters if brings_tokenizer(a.directory)]
        return found[0] if found else None

    def read(self, key: str) -> Tensor:
        """One tensor with the adapters in it, cast once to the dtype it is listed with.

        Raises InputError where they make it NaN or infinite.
        """
        tensor = self._read(key, self.entries[key].dtype)
        if key in self._changes and not _finite(tensor):
            raise InputError(
                f"holds NaN or infinity once the adapter is merged (as {tensor.dtype})",
                subject=key,
                fix="The adapter or the base is damaged, or --dtype is too narrow for it.",
            )
        return tensor

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        """``read(key)[start:stop]``; a tensor that the adapters change is made whole, and kept
        until another one is asked for."""
        if key not in self._changes and key in self.base.entries:
            return self.base.read_rows(key, start, stop).to(self.entries[key].dtype)
        if self._whole is None or self._whole[0] != key:
            self._whole = (key, self.read(key))
        return self._whole[1][start:stop]

    def read_float32(self, key: str) -> Tensor:
        """The same before the cast."""
        return self._read(key, torch.float32)

    def read_unmerged(self, key: str) -> Tensor:
        """In float32, with what the adapters replace but without what they add."""
        return self._read(key, torch.float32, add=False)

    def touches(self, name: str) -> bool:
        """Whether the adapters do anything to the parameter of this name."""
        return name in self._model.names and self.key(name) in self._changes

    def key(self, name: str) -> str:
        """The key of a parameter here, where tied parameters may have come apart."""
        return name if name in self._sources else self._model.names[name]

    def factors(self, name: str) -> Factors | None:
        """What is added to the weight of this parameter name, if anything."""
        change = self._changes.get(self.key(name))
        return None if change is None else change.factors()

    def added(self, name: str) -> Tensor | None:
        """What is added to the bias of this parameter name, if anything: (out,) float32."""
        change = self._changes.get(self.key(name))
        return None if change is None else change.added()

    def trained_tokens(self) -> list[int]:
        """Rows of the embeddings that the adapters replace one by one."""
        rows = (r for a in self.adapters for found in a.lora.tokens.values() for r in found)
        return sorted(set(rows))

    def _read(self, key: str, dtype: torch.dtype, *, add: bool = True) -> Tensor:
        change = self._changes.get(key)
        replaced = None if change is None else change.replaced()
        tensor = self.base.read(self._sources.get(key, key)) if replaced is None else replaced
        if not tensor.is_floating_point():
            return tensor
        if change is None:
            return tensor.to(dtype)
        if add and (factors := change.factors()) is not None:
            return factors.merge(tensor, dtype)
        if add and (added := change.added()) is not None:
            return tensor.float().add_(added).to(dtype)
        return change.with_tokens(tensor.to(dtype))

    def _check_combination(self) -> None:
        """Refuse what weights can't be applied to, and what PEFT can't combine either."""
        for adapter in self.adapters:
            biased = any(part.added for part in adapter.parts.values())
            if adapter.lora.dora or biased:
                raise InputError(
                    f"has {'DoRA magnitudes' if adapter.lora.dora else 'biases beside B'}, "
                    "which can't be weighted or combined",
                    subject=str(adapter.directory),
                    fix="Merge it alone with weight 1; then merge the others into the result.",
                )
            whole = [name for name, part in adapter.parts.items() if part.replaced or part.tokens]
            if whole and adapter.weight != 1:
                self.warnings.append(
                    f"the weight {adapter.weight:g} of {adapter.directory.name} doesn't apply to "
                    f"what it replaces: {listed(sorted(whole))}"
                )
        ranks = {adapter.lora.largest_rank() for adapter in self.adapters}
        if len(ranks) > 1:
            raise InputError(
                f"adapters of ranks {', '.join(map(str, sorted(ranks)))} can't be combined",
                where=str(self.adapters[0].directory),
                fix="Merge one, then merge the next into the result.",
            )
        if len(self.adapters) > 1 and self.adapters[0].lora.rslora:
            self.warnings.append(
                "PEFT multiplies a combination whose first adapter is rank-stabilized by √r once "
                "more; so does this merge"
            )

    def _check_targets(self, adapter: Adapter) -> None:
        """Compare the adapter's tensors with the base's parameters and with its own config."""
        lora, where, names = adapter.lora, str(adapter.directory), self._model.names
        if unknown := [name for name in adapter.parts if name not in names]:
            raise InputError(
                f"{len(unknown)} of the {len(adapter.parts)} parameters that it changes aren't in "
                f"the base: {listed(sorted(unknown))}",
                where=where,
                fix="It was trained for another base" + (f": {lora.base}." if lora.base else "."),
            )
        present = {name for name, part in adapter.parts.items() if part.a}
        if lora.targets is None:
            return
        wanted = {
            name
            for name, key in names.items()
            if name.endswith(".weight")
            and len(self.base.shape(key)) > 1
            and lora.targets_module(name.removesuffix(".weight"))
        }
        if missing := sorted(wanted - present):
            raise InputError(
                f"lacks the factors of {listed(missing)}, which its target_modules names",
                subject=where,
                fix="The adapter is incomplete, or was trained for another base.",
            )
        shared = set(self._model.vocabulary) if lora.tied else set()
        if extra := sorted(present - wanted - shared):
            self.warnings.append(
                f"{adapter.directory.name} has factors for {listed(extra)}, which its "
                "target_modules doesn't name; they are merged"
            )

    def _check_base(self, adapter: Adapter, base_name: str) -> None:
        known = {base_name, self.base.directory.name, str(self.base.config.get("_name_or_path"))}
        wanted = adapter.lora.base
        if wanted and _last(wanted) not in {_last(name) for name in known}:
            self.warnings.append(
                f"{adapter.directory.name} was trained for {wanted}; the base is {base_name}"
            )

    def _collect(self) -> dict[str, Change]:
        """Parameter name → what all adapters do to it, checked."""
        combined = None
        if len(self.adapters) > 1:
            first = self.adapters[0].lora
            combined = math.sqrt(first.largest_rank()) if first.rslora else 1.0
        found: dict[str, Change] = {}
        for adapter in self.adapters:
            for name, part in adapter.parts.items():
                module = name.rpartition(".")[0]
                empty = Change(module, module in self._model.conv1d, combined, [])
                found.setdefault(name, empty).parts.append((adapter, part))
        for name, change in found.items():
            shape = self.base.shape(self._model.names[name])
            if change.check(shape) != shape and name not in self._model.vocabulary:
                raise InputError(
                    f"{name} has {change.check(shape)[0]} rows, the base's tensor {shape[0]}",
                    where=str(change.parts[0][0].directory),
                    fix="It was trained for another base.",
                )
        return found

    def _place(self, found: dict[str, Change]) -> None:
        """Give every change a key; tied parameters that differ from now on get one each."""
        shared: dict[str, list[str]] = {}
        for name, key in self._model.names.items():
            shared.setdefault(key, []).append(name)
        for key, names in shared.items():
            owner = self._model.input if self._model.input in names else names[0]
            if owner in found and all(part.tokens for _, part in found[owner].parts):
                for name in names:  # PEFT lets tied embeddings share their trained rows
                    found.setdefault(name, found[owner])
            changed = [name for name in names if name in found]
            if len(changed) == len(names) and all(found[n].same(found[owner]) for n in names):
                self._change(key, found[owner])
            elif changed:
                self.untied = True
                for name in names:
                    if name != owner:
                        self._sources[name] = key
                        self.entries[name] = self.base.entries[key]
                    if name in found:
                        self._change(key if name == owner else name, found[name])

    def _change(self, key: str, change: Change) -> None:
        self._changes[key] = change
        self.entries[key] = _with(self.entries[key], shape=change.check(self.entries[key].shape))

    def _settle_vocabulary(self) -> None:
        """Let the config say how many tokens there are and whether the embeddings are tied."""
        keys = {name: self.key(name) for name in self._model.vocabulary}
        weights = {key for name, key in keys.items() if name.endswith(".weight")}
        tied = self.base.config.get("tie_word_embeddings") is not False
        if tied and len(weights) > 1 and weights & self._changes.keys():
            self.untied = True
            _set(self.config, "tie_word_embeddings", False)
        rows = {key: self.shape(key)[0] for key in keys.values()}
        self.vocabulary = next(iter(rows.values()))
        self.resized = any(
            count != self.base.shape(self._sources.get(key, key))[0] for key, count in rows.items()
        )
        if not self.resized:
            return
        if len(set(rows.values())) > 1:
            sizes = ", ".join(f"{key} {count}" for key, count in rows.items())
            raise InputError(
                f"resizes the vocabulary on one side only (rows: {sizes})",
                subject=str(self.adapters[0].directory),
                fix="Save it again with save_embedding_layers=True.",
            )
        _set(self.config, "vocab_size", self.vocabulary)


class _Model:
    """What is asked of a model: where its embeddings are, and what it stores as (in, out).

    input: the input embedding's parameter; vocabulary: all parameters with a row a token.
    """

    def __init__(self, model: PreTrainedModel, names: Mapping[str, str]) -> None:
        from transformers.pytorch_utils import Conv1D

        self.names = names
        modules = list(model.named_modules())
        self.conv1d = {name for name, module in modules if isinstance(module, Conv1D)}
        first, last = model.get_input_embeddings(), model.get_output_embeddings()
        self.input = next((f"{name}.weight" for name, m in modules if m is first), "")
        ends = [f"{n}.{leaf}" for n, m in modules if m in (first, last) for leaf in _LEAVES]
        self.vocabulary = [name for name in ends if name in names]


_LEAVES = ("weight", "bias")


def _with(
    entry: TensorEntry, *, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None
) -> TensorEntry:
    shape, dtype = shape or entry.shape, dtype or entry.dtype
    nbytes = math.prod(shape) * dtype.itemsize
    return dataclasses.replace(entry, shape=shape, dtype=dtype, nbytes=nbytes)


def _finite(tensor: Tensor) -> bool:
    """Whether there is no NaN and no infinity. Nearly always the sum, which is cheap, says so."""
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def _set(config: dict[str, Any], field: str, value: object) -> None:
    """Set a field where it stands, be it in the text part of a config of several parts."""
    text = config.get("text_config")
    if isinstance(text, dict) and field in text:
        config["text_config"] = {**text, field: value}
        if field not in config:
            return
    config[field] = value


def _last(name: str) -> str:
    return name.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1].lower()
