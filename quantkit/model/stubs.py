"""Forwards replaced for a while: how a model's own code is run around its decoder layers.

Masks, rotary embeddings and whatever else a model hands to its layers are made by its own code, and
so is what it does after them (final norm, scaling, soft caps). Here that code runs with a stub in
the place of every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantkit.base.errors import InputError
from quantkit.model.refusals import running
from quantkit.model.skeleton import Skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Call:
    """The arguments of one layer besides its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


# Arguments that a layer can't put anything into, tuples of them aside.
_FIXED = (Tensor, bool, int, float, str, torch.dtype, torch.device)
# What layers return beside the hidden states: nothing at all, or a tuple with so many things more.
_BESIDE = (None, 0, 1, 2)
# What a model's own code raises where a layer's output isn't what it expects.
FAILURES = (AttributeError, IndexError, TypeError, ValueError, RuntimeError, KeyError)


class Stop(Exception):
    """Raised by a stub to end a forward of which no more is needed."""


class Stubs:
    """A model's forward without its layers: what comes before them, and what comes after."""

    def __init__(self, skeleton: Skeleton) -> None:
        self._model: PreTrainedModel = skeleton.model
        self._layers = skeleton.layers
        self._directory = skeleton.directory
        self._beside: int | None = None

    def record(self, ids: Tensor) -> tuple[Tensor, list[Call]]:
        """The hidden states (rows, tokens, hidden_size) that the first layer gets for ``ids``
        (rows, tokens), and the arguments of every layer.

        Raises InputError for a model whose layers can't be run one by one, and for one that
        transformers can't run.
        """
        with running(self._model, self._directory):
            return self._record(ids)

    def _record(self, ids: Tensor) -> tuple[Tensor, list[Call]]:
        errors: list[Exception] = []
        for beside in _BESIDE:
            # Families' layers return a tensor, or a tuple of it and of what is None here. Returning
            # the wrong kind changes what the next layer sees, so a trial tells which it is.
            self._beside = beside
            seen: list[Tensor] = []
            calls: list[Call] = []
            with self._replaced(self._recorder(seen, calls), ids.device):
                try:
                    self._model(input_ids=ids, use_cache=False)
                except Stop:
                    pass
                except FAILURES as error:
                    errors.append(error)
                    continue
            if seen and all(_like(hidden, seen[0]) for hidden in seen):
                return seen[0], calls
        if errors:
            raise errors[0]
        raise InputError(
            f"the layers of {type(self._model).__name__} can't be run one by one",
            where=str(self._directory),
        )

    def run_some(
        self, ids: Tensor, chosen: Collection[int], project: Callable[[Tensor], Tensor]
    ) -> None:
        """The model's own forward for ``ids`` (rows, tokens), with ``project`` in the place of its
        output embedding. Only the layers of these numbers compute; the others pass on what they
        get. ``record`` comes first, which learns how.
        """

        def stub(index: int) -> Forward | None:
            passing = lambda hidden, *args, **kwargs: self._output(hidden)  # noqa: E731
            return None if index in chosen else passing

        with (
            self._replaced(stub, ids.device),
            forward_as(self._model.get_output_embeddings(), project),
            running(self._model, self._directory),
        ):
            self._model(input_ids=ids, use_cache=False)

    def finish(self, ids: Tensor, hidden: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor:
        """The model's logits for what its layers made of ``ids``, with ``project`` in the place
        of its output embedding."""
        embedding = self._model.get_input_embeddings()

        def embed(ids: Tensor) -> Tensor:
            # Only the shape matters: the last stub returns ``hidden`` whatever comes in.
            shape = (*ids.shape, embedding.weight.shape[1])
            return torch.zeros(shape, dtype=self._model.dtype, device=hidden.device)

        def stub(index: int) -> Forward:
            last = index == len(self._layers) - 1
            return lambda other, *args, **kwargs: self._output(hidden if last else other)

        with (
            self._replaced(stub, hidden.device),
            forward_as(self._model.get_output_embeddings(), project),
            zeros_as_weight(embedding, hidden.device),
            forward_as(embedding, embed),
            running(self._model, self._directory),
        ):
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits
            return logits

    def _recorder(self, seen: list[Tensor], calls: list[Call]) -> Callable[[int], Forward]:
        def stub(index: int) -> Forward:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
                seen.append(hidden_states)
                calls.append(Call(args, kwargs))
                if index == len(self._layers) - 1:
                    raise Stop
                return self._output(hidden_states)

            return forward

        return stub

    def _output(self, hidden: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        return hidden if self._beside is None else (hidden, *[None] * self._beside)

    @contextmanager
    def _replaced(
        self, stub: Callable[[int], Forward | None], device: torch.device
    ) -> Iterator[None]:
        """Give every layer the forward that ``stub`` has for its number; its own for None."""
        try:
            for index, layer in enumerate(self._layers):
                if (forward := stub(index)) is not None:
                    layer.forward = forward
            with _says_device(device):
                yield
        finally:
            for layer in self._layers:
                layer.__dict__.pop("forward", None)


def _like(one: Any, other: Any) -> bool:
    return isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape


@contextmanager
def _says_device(device: torch.device) -> Iterator[None]:
    """Let models say that they are on ``device``: most of their parameters are on none."""
    from transformers import PreTrainedModel

    named = PreTrainedModel.device
    PreTrainedModel.device = property(lambda _: device)
    try:
        yield
    finally:
        PreTrainedModel.device = named


@contextmanager
def weight_as(module: nn.Module, weight: nn.Parameter) -> Iterator[None]:
    """Let ``weight`` be the weight of ``module``."""
    original = module._parameters["weight"]
    module._parameters["weight"] = weight
    try:
        yield
    finally:
        module._parameters["weight"] = original


@contextmanager
def zeros_as_weight(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Let the weight of ``module`` be zeros that take no memory: some models look at a row of their
    embedding (the padding's) that they then make no use of. Without a weight, nothing is done."""
    original = module._parameters.get("weight")
    if original is None:
        yield
        return
    zero = torch.zeros((), dtype=original.dtype, device=device).expand(original.shape)
    with weight_as(module, nn.Parameter(zero, requires_grad=False)):
        yield


@contextmanager
def forward_as(module: nn.Module, function: Forward) -> Iterator[None]:
    """Let ``function`` be the forward of ``module``."""
    # An instance's attribute hides the method of its class, and nothing else is touched.
    module.forward = function
    try:
        yield
    finally:
        module.__dict__.pop("forward", None)


def hands_on(calls: Iterable[Call]) -> bool:
    """Whether layers may hand each other more than hidden states: by something in their arguments
    that one can put things into and another take them from, such as shared keys and values."""
    return not all(_fixed((call.args, tuple(call.kwargs.values()))) for call in calls)


def _fixed(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_fixed, value))
    return value is None or isinstance(value, _FIXED)


def same_arguments(one: Any, other: Any) -> bool:
    """Whether recorded arguments are equal, tensors value by value."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, Call):
        return same_arguments(one.args, other.args) and same_arguments(one.kwargs, other.kwargs)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(
            same_arguments(value, other[key]) for key, value in one.items()
        )
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same_arguments, one, other))
    return one is other or bool(one == other)
