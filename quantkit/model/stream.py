"""One block in memory at a time.

The decoder layers' arguments (masks, rotary embeddings) are recorded once by stubs that stand in
for the layers during one cheap forward; afterwards each real layer is loaded, run on the hidden
states, and dropped. The head is run the same way: a forward in which the last stub gives back
the hidden states that the real layers made, and the output embedding is applied in slices of the
vocabulary, so that whatever the model does around them (final norm, scaling, soft caps) is done
by its own code.

The embeddings are never whole in memory: of the input's the rows of the tokens in hand are read,
of the output's the slice of the vocabulary in hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantkit.base.errors import InputError
from quantkit.base.parallel import Ahead, return_free_blocks
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.weights import TensorSource
from quantkit.model.rounding import round_inputs
from quantkit.model.skeleton import Skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Call:
    """The arguments of one layer besides its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Batch:
    """Rows under way: their token ids, their hidden states and each layer's arguments."""

    ids: Tensor  # (rows, tokens) int64
    hidden: Tensor  # (rows, tokens, hidden_size)
    calls: list[Call]


class _Recorded(Exception):
    """The last stub was reached; nothing after it is needed."""


class Stream:
    """A model whose weights come from ``source`` block by block.

    Computes on ``device`` in the skeleton's dtype, and rounds the inputs of linears as the engines
    of ``source`` do. Weights are in memory while a block is
    entered; those of the next one are got ready in the background meanwhile.
    """

    def __init__(self, skeleton: Skeleton, source: TensorSource, device: torch.device) -> None:
        self.skeleton = skeleton
        self.source = source
        self.device = device
        for buffer_owner in skeleton.model.modules():
            for name, buffer in buffer_owner._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    buffer_owner._buffers[name] = buffer.to(device)
        self._returns_tuple = False
        self._ahead = Ahead()

    def begin(self, rows: Tensor, batch_size: int) -> list[Batch]:
        """Embed ``rows`` (rows, tokens) and record every layer's arguments."""
        return list(self.beginning(rows, batch_size))

    def beginning(
        self, rows: Tensor, batch_size: int, embedding: Callable[[int, int], Tensor] | None = None
    ) -> Iterator[Batch]:
        """The same, one batch after the other; ``embedding``: its rows first to last + 1."""
        first: list[Call] = []
        with self._loaded(self._outside()):
            for ids in rows.to(self.device).split(batch_size):
                with torch.inference_mode(), self._embedding(ids, embedding):
                    hidden, calls = self._record(ids)
                if first and _same(calls, first):
                    calls = first  # usually so: keep one copy of masks and rotations
                first = first or calls
                yield Batch(ids, hidden, calls)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Layer ``index`` with its weights in memory."""
        names = self._inside(index)
        weights = self._ahead.take(index, partial(self._read, names))
        if index + 1 < len(self.skeleton.layers):
            self._foresee(index + 1)
        with self._loaded(names, weights):
            yield self.skeleton.layers[index]
        return_free_blocks()

    def _foresee(self, index: int) -> None:
        """Have a layer's weights at hand soon: in the system's cache, if they lie on disk as they
        are, so that a second block isn't held; else unpacked in the background."""
        names = self._inside(index)
        if isinstance(self.source, Checkpoint):
            self.source.expect({self.skeleton.key(name) for name in names})
        else:
            self._ahead.start(index, partial(self._read, names))

    @torch.inference_mode()
    def run(self, index: int, block: nn.Module, batch: Batch, hidden: Tensor) -> Tensor:
        """What ``block`` makes of ``batch`` with the hidden states (rows, tokens, hidden_size)."""
        call = batch.calls[index]
        return _tensor(block(hidden, *call.args, **call.kwargs))

    def advance(self, index: int, block: nn.Module, batches: list[Batch]) -> None:
        """Carry every batch through ``block``."""
        for batch in batches:
            batch.hidden = self.run(index, block, batch, batch.hidden)

    @contextmanager
    def head(self) -> Iterator[Callable[[Batch, slice], Tensor]]:
        """A function from (batch, slice of the vocabulary) to logits (rows, tokens, slice).

        A slice is exact because what models do to logits afterwards is elementwise.
        """
        model = self.skeleton.model
        output = model.get_output_embeddings()
        if not isinstance(output, nn.Linear):
            raise InputError(
                f"{type(model).__name__} has no linear output embedding",
                where=str(self.skeleton.directory),
            )

        key = self.output_key
        held: dict[tuple[int, int], Tensor] = {}

        def rows(part: slice) -> Tensor:
            place = part.indices(self.vocabulary)[:2]
            if place not in held:
                held.clear()
                value = self.source.read_rows(key, *place)
                held[place] = value.to(self.device, self.skeleton.model.dtype)
            return held[place]

        @torch.inference_mode()
        def logits(batch: Batch, part: slice) -> Tensor:
            def project(hidden: Tensor) -> Tensor:
                bias = None if output.bias is None else output.bias[part]
                return nn.functional.linear(hidden, rows(part), bias)

            return self._finish(batch.ids, batch.hidden, project)

        with self._loaded(self._outside()):
            yield logits

    @contextmanager
    def before_head(self) -> Iterator[Callable[[Batch, Tensor], Tensor]]:
        """A function from a batch and its hidden states after all layers to what the output
        embedding reads of them, (rows, tokens, hidden_size)."""

        @torch.inference_mode()
        def read(batch: Batch, hidden: Tensor) -> Tensor:
            seen: list[Tensor] = []

            def project(hidden: Tensor) -> Tensor:
                seen.append(hidden)
                raise _Recorded

            with suppress(_Recorded):
                self._finish(batch.ids, hidden, project)
            return seen[0]

        with self._loaded(self._outside()):
            yield read

    def _finish(self, ids: Tensor, hidden: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor:
        """Let the model go on from what its layers made, with ``project`` for its output."""
        model = self.skeleton.model
        embedding = model.get_input_embeddings()

        def nothing(ids: Tensor) -> Tensor:
            """The last stub will not look at what came in."""
            return torch.zeros(
                (*ids.shape, embedding.weight.shape[1]), dtype=model.dtype, device=self.device
            )

        def stub(index: int) -> Callable[..., Any]:
            last = index == len(self.skeleton.layers) - 1
            return lambda other, *args, **kwargs: self._wrap(hidden if last else other)

        with (
            self._stubs(stub),
            forward_as(model.get_output_embeddings(), project),
            forward_as(embedding, nothing),
        ):
            result: Tensor = model(input_ids=ids, use_cache=False).logits
            return result

    @contextmanager
    def whole(self) -> Iterator[PreTrainedModel]:
        """The model with all its weights in memory, for engines that must hold it."""
        with self._loaded(list(self.skeleton.names)):
            yield self.skeleton.model

    @property
    def output_key(self) -> str:
        """The checkpoint's key of the output embedding's weight."""
        return self.skeleton.key(self._name_of(self.skeleton.model.get_output_embeddings()))

    @property
    def vocabulary(self) -> int:
        """Rows of the output embedding."""
        return int(self.skeleton.model.get_output_embeddings().weight.shape[0])

    def _record(self, ids: Tensor) -> tuple[Tensor, list[Call]]:
        for attempt in (False, True):
            # Some families' layers return a tuple, others a tensor. Handing the wrong kind on
            # changes the shape that the next layer sees, so which it is can be observed.
            self._returns_tuple = attempt
            seen: list[Tensor] = []
            calls: list[Call] = []
            with self._stubs(self._recorder(seen, calls)):
                try:
                    self.skeleton.model(input_ids=ids, use_cache=False)
                except _Recorded:
                    pass
                except (AttributeError, IndexError, TypeError, RuntimeError):
                    if attempt:
                        raise
                    continue
            if seen and all(hidden.shape == seen[0].shape for hidden in seen):
                return seen[0], calls
        raise InputError(
            f"the layers of {type(self.skeleton.model).__name__} can't be run one by one",
            where=str(self.skeleton.directory),
        )

    def _recorder(
        self, seen: list[Tensor], calls: list[Call]
    ) -> Callable[[int], Callable[..., Any]]:
        count = len(self.skeleton.layers)

        def stub(index: int) -> Callable[..., Any]:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
                seen.append(hidden_states)
                calls.append(Call(args, kwargs))
                if index == count - 1:
                    raise _Recorded
                return self._wrap(hidden_states)

            return forward

        return stub

    def _wrap(self, hidden: Tensor) -> Tensor | tuple[Tensor]:
        return (hidden,) if self._returns_tuple else hidden

    @contextmanager
    def _stubs(self, make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
        layers = self.skeleton.layers
        try:
            for index, layer in enumerate(layers):
                layer.forward = make(index)
            yield
        finally:
            for layer in layers:
                layer.__dict__.pop("forward", None)

    def _inside(self, index: int) -> list[str]:
        prefix = self.skeleton.layer_name(index) + "."
        return [name for name in self.skeleton.names if name.startswith(prefix)]

    def _outside(self) -> list[str]:
        """Parameters outside the blocks, without the embeddings' weights."""
        model = self.skeleton.model
        inside = self.skeleton.prefix + "."
        streamed = {
            id(module.weight)
            for module in (model.get_input_embeddings(), model.get_output_embeddings())
            if isinstance(module, nn.Embedding | nn.Linear)
        }
        return [
            name
            for name in self.skeleton.names
            if not name.startswith(inside) and id(_value(model, name)) not in streamed
        ]

    def _name_of(self, module: nn.Module) -> str:
        """The name of a module's weight."""
        names = (name for name, other in self.skeleton.model.named_modules() if other is module)
        return f"{next(names)}.weight"

    @contextmanager
    def _embedding(self, ids: Tensor, rows: Callable[[int, int], Tensor] | None) -> Iterator[None]:
        """Let the input embedding look up ``ids`` in a table of the rows that they need."""
        embedding = self.skeleton.model.get_input_embeddings()
        if not isinstance(embedding, nn.Embedding):
            yield
            return
        wanted, places = ids.unique(return_inverse=True)
        key = self.skeleton.key(self._name_of(embedding))
        read = rows or partial(self.source.read_rows, key)
        table = torch.cat([read(*run) for run in _runs(wanted.tolist())])
        look_up, weight, padding = embedding.forward, embedding.weight, embedding.padding_idx
        value = table.to(self.device, weight.dtype)
        embedding.weight = nn.Parameter(value, requires_grad=False)
        embedding.padding_idx = None  # of no use without gradients, and maybe not in the table
        try:
            with forward_as(embedding, lambda _: look_up(places)):
                yield
        finally:
            embedding.weight, embedding.padding_idx = weight, padding

    @contextmanager
    def _loaded(self, names: list[str], weights: Weights | None = None) -> Iterator[None]:
        """The named parameters with their weights in place; as they were afterwards."""
        model = self.skeleton.model
        kept = [(*_place(model, name), _value(model, name)) for name in names]
        handles = round_inputs(self.skeleton, self.source, names)
        try:
            self.fill(names, weights)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for place, leaf, original in kept:
                place[leaf] = original

    def _read(self, names: list[str]) -> Weights:
        return {key: self.source.read(key) for key in {self.skeleton.key(n): n for n in names}}

    def fill(self, names: list[str], weights: Weights | None = None) -> None:
        """Put the named parameters' weights in place for good. Tied ones share their memory.

        weights: by checkpoint key, where they have been read already; emptied on the way.
        """
        shared: dict[str, Tensor] = {}
        for name in names:
            place, leaf = _place(self.skeleton.model, name)
            original = place[leaf]
            key = self.skeleton.key(name)
            if key not in shared:
                read = weights.pop(key) if weights is not None else self.source.read(key)
                value = read.to(self.device, original.dtype)
                is_parameter = isinstance(original, nn.Parameter)
                shared[key] = nn.Parameter(value, requires_grad=False) if is_parameter else value
            place[leaf] = shared[key]


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Rising numbers as (first, last + 1) of those without a gap."""
    start = previous = numbers[0]
    for number in numbers[1:]:
        if number != previous + 1:
            yield start, previous + 1
            start = number
        previous = number
    yield start, previous + 1


def slices(vocabulary: int, size: int = 2048) -> Iterator[slice]:
    """The vocabulary in parts that fit in memory beside the hidden states."""
    for start in range(0, vocabulary, size):
        yield slice(start, min(start + size, vocabulary))


def _place(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """The dictionary that holds a parameter or buffer, and its key there."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    return (owner._parameters if leaf in owner._parameters else owner._buffers), leaf


def _value(model: nn.Module, name: str) -> Tensor:
    place, leaf = _place(model, name)
    value: Tensor = place[leaf]
    return value


@contextmanager
def forward_as(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Let ``function`` stand in for what ``module`` does."""
    module.forward = function
    try:
        yield
    finally:
        module.__dict__.pop("forward", None)


def _tensor(output: Any) -> Tensor:
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


def _same(one: Any, other: Any) -> bool:
    """Deep equality of recorded arguments."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, Call):
        return _same(one.args, other.args) and _same(one.kwargs, other.kwargs)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(v, other[k]) for k, v in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or bool(one == other)
