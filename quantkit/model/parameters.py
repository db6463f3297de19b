"""A model's parameters, put in place from a source of weights and taken out again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.base.errors import InputError
from quantkit.base.names import dtype_name
from quantkit.checkpoint.weights import TensorSource
from quantkit.model.device import free_memory
from quantkit.model.rounding import round_inputs
from quantkit.model.skeleton import Skeleton
from quantkit.model.stubs import forward_as, weight_as, zeros_as_weight

_ROWS_A_TOKEN = 8  # of a table, at most
_TABLE_SHARE = 8  # of a device's free memory, the part that rows of an embedding may take


@dataclass(frozen=True)
class EmbeddingTable:
    """Rows of the input embedding on the device, from number ``first`` on."""

    first: int
    rows: nn.Parameter


class Parameters:
    """The parameters of ``skeleton``, read from ``source`` and computed with on ``device``."""

    def __init__(self, skeleton: Skeleton, source: TensorSource, device: torch.device) -> None:
        self._skeleton = skeleton
        self._source = source
        self._device = device

    def of_layer(self, index: int) -> list[str]:
        """The names of a decoder layer's parameters."""
        prefix = self._skeleton.layer_name(index) + "."
        return [name for name in self.in_text() if name.startswith(prefix)]

    def in_text(self) -> list[str]:
        """The names of all parameters but those of towers, through which text doesn't run."""
        towers = tuple(f"{name}." for name in self._skeleton.towers)
        names = [*self._skeleton.names, *self._skeleton.fusions]
        return [name for name in names if not name.startswith(towers)]

    def outside_layers(self) -> list[str]:
        """The names of all others but the embeddings' weights, which are read row by row."""
        model = self._skeleton.model
        inside = self._skeleton.prefix + "."
        streamed = {
            id(module.weight)
            for module in (model.get_input_embeddings(), model.get_output_embeddings())
            if isinstance(module, nn.Embedding | nn.Linear)
        }
        return [
            name
            for name in self.in_text()
            if not name.startswith(inside) and id(_value(model, name)) not in streamed
        ]

    def weight_of(self, module: nn.Module) -> str:
        """The name of a module's weight."""
        modules = self._skeleton.model.named_modules()
        return next(f"{name}.weight" for name, other in modules if other is module)

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """The named parameters' weights by checkpoint key, as they are stored: on the CPU, where a
        device copies them by itself, or on the device."""
        return {key: self._pinned(self._source.read(key)) for key in self.keys(names)}

    def _pinned(self, tensor: Tensor) -> Tensor:
        pins = self._device.type == "cuda" and tensor.device.type == "cpu"
        return tensor.pin_memory() if pins else tensor

    def keys(self, names: list[str]) -> list[str]:
        """The checkpoint keys that the named parameters are made of, each once."""
        skeleton = self._skeleton
        found: dict[str, None] = {}
        for name in names:
            fusion = skeleton.fusions.get(name)
            found |= dict.fromkeys([skeleton.key(name)] if fusion is None else fusion.keys)
        return list(found)

    def fill(self, names: list[str], weights: dict[str, Tensor] | None = None) -> None:
        """Put the named parameters' weights in place for good. Tied ones share their memory.

        weights: by checkpoint key, where they have been read already; emptied on the way.
        """
        shared: dict[str, Tensor] = {}
        take = self._source.read if weights is None else weights.pop
        made: dict[str, Tensor] = {}
        for name in names:
            place, leaf = _place(self._skeleton.model, name)
            original = place[leaf]
            fusion = self._skeleton.fusions.get(name)
            if fusion is not None and name not in made:
                made |= fusion.convert(take)
            key = name if fusion is not None else self._skeleton.key(name)
            if key not in shared:
                read = made.pop(name) if fusion is not None else take(key)
                value = read.to(self._device, original.dtype, non_blocking=True)
                if original.dtype == torch.float16:
                    _check_fits(key, read, value)
                is_parameter = isinstance(original, nn.Parameter)
                shared[key] = nn.Parameter(value, requires_grad=False) if is_parameter else value
            place[leaf] = shared[key]

    @contextmanager
    def loaded(self, names: list[str], weights: dict[str, Tensor] | None = None) -> Iterator[None]:
        """Have the named parameters' weights in place while the block runs.

        Linears round their inputs where the engines of the source do.
        """
        model = self._skeleton.model
        kept = [(*_place(model, name), _value(model, name)) for name in names]
        handles = round_inputs(self._skeleton, self._source, names)
        try:
            self.fill(names, weights)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for place, leaf, original in kept:
                place[leaf] = original

    @contextmanager
    def embedding_of(
        self,
        ids: Tensor,
        read_rows: Callable[[int, int], Tensor] | None = None,
        table: EmbeddingTable | None = None,
    ) -> Iterator[None]:
        """Let the input embedding look up ``ids`` in a table of the rows that they need.

        read_rows: gives rows ``start`` to before ``stop`` of the embedding, where they aren't the
        source's; table: that has the rows already.
        """
        embedding = self._skeleton.model.get_input_embeddings()
        if not isinstance(embedding, nn.Embedding):
            yield
            return
        look_up, weight, padding = embedding.forward, embedding.weight, embedding.padding_idx
        if table is None:
            wanted, places = ids.unique(return_inverse=True)
            read = read_rows or self._read_embedding(embedding)
            rows = torch.cat([read(start, stop) for start, stop in _runs(wanted.tolist())])
            value = nn.Parameter(rows.to(self._device, weight.dtype), requires_grad=False)
        else:
            value, places = table.rows, ids - table.first

        def forward(_: Tensor) -> Tensor:
            with weight_as(embedding, value):
                found: Tensor = look_up(places)
            return found

        # It is of no use without gradients, and its row may not be in the table.
        embedding.padding_idx = None
        try:
            with zeros_as_weight(embedding, self._device), forward_as(embedding, forward):
                yield
        finally:
            embedding.weight, embedding.padding_idx = weight, padding

    def embedding_table(
        self, ids: Tensor, read_rows: Callable[[int, int], Tensor] | None = None
    ) -> EmbeddingTable | None:
        """A table for all of ``ids``, where the device has memory of its own, and room for it.

        There it takes longer to look which rows each batch needs than to copy all of them, but for
        a short text.
        """
        embedding = self._skeleton.model.get_input_embeddings()
        free = free_memory(self._device)
        if free is None or not isinstance(embedding, nn.Embedding):
            return None
        first, last = int(ids.min()), int(ids.max())
        count, dtype = last + 1 - first, embedding.weight.dtype
        nbytes = count * embedding.weight.shape[1] * dtype.itemsize
        if nbytes > free // _TABLE_SHARE or count > _ROWS_A_TOKEN * ids.numel():
            return None
        rows = (read_rows or self._read_embedding(embedding))(first, last + 1)
        value = nn.Parameter(rows.to(self._device, dtype), requires_grad=False)
        return EmbeddingTable(first, value)

    def _read_embedding(self, embedding: nn.Embedding) -> Callable[[int, int], Tensor]:
        key = self._skeleton.key(self.weight_of(embedding))
        return partial(self._source.read_rows, key)


def _check_fits(key: str, stored: Tensor, value: Tensor) -> None:
    """Raise InputError where float16, the config's dtype, is too narrow for a stored tensor."""
    if stored.dtype == value.dtype or bool(value.isfinite().all()):
        return
    if bool(stored.isfinite().all()):
        dtype = dtype_name(stored.dtype)
        raise InputError(
            f"holds {float(stored.abs().max()):.4g} in {dtype}, which float16, the dtype in "
            "config.json, can't hold",
            subject=key,
            fix=f'Set "dtype" in config.json to "{dtype}": transformers would make it infinity.',
        )


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Rising numbers as (first, last + 1) of those that follow each other without a gap."""
    start = previous = numbers[0]
    for number in numbers[1:]:
        if number != previous + 1:
            yield start, previous + 1
            start = number
        previous = number
    yield start, previous + 1


def _place(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """The dictionary that holds a parameter or buffer, and its key there."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    return (owner._parameters if leaf in owner._parameters else owner._buffers), leaf


def _value(model: nn.Module, name: str) -> Tensor:
    place, leaf = _place(model, name)
    value: Tensor = place[leaf]
    return value
