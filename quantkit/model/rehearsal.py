"""A model's layers run once without its weights, to see that they can be and what they run.

Every parameter is a small random matrix whose rows overlap in memory, so that this takes neither a
checkpoint's bytes nor memory of the model's size, and a plan can refuse what the work couldn't do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.base.errors import InputError
from quantkit.model.refusals import running
from quantkit.model.skeleton import Skeleton
from quantkit.model.stubs import FAILURES, Stop, Stubs

_TOKENS = 8
_OF_A_KIND = 2  # layers of the same parameters that are run; the others pass hidden states on
_TOLERANCE = 1e-2  # of the largest hidden state: a layer that is left out changes far more


@torch.inference_mode()
def rehearse(skeleton: Skeleton) -> set[str]:
    """Full names of the layers' linears that are called when text runs through the model.

    A model may use a linear's weight without calling it, as state-space layers do with dt_proj.
    Layers whose parameters have the same names and shapes are taken to be alike. Raises InputError
    where transformers can't run the model, and where its layers, run one by one, don't give what
    the model itself computes.
    """
    model = skeleton.model
    ids = torch.arange(_TOKENS)[None] % skeleton.config.get_text_config().vocab_size
    if model.get_output_embeddings() is None:
        raise InputError(
            f"{type(model).__name__} has no output embedding", where=str(skeleton.directory)
        )
    kinds = _kinds(skeleton)
    chosen = _chosen(kinds)
    stubs = Stubs(skeleton)
    with _random(model, skeleton.towers), running(model, skeleton.directory):
        hidden, calls = stubs.record(ids)
        with _watched(skeleton):
            expected = _reads(lambda project: stubs.run_some(ids, chosen, project))
        called: dict[Any, set[str]] = {}
        for index, (layer, call) in enumerate(zip(skeleton.layers, calls, strict=True)):
            if index not in chosen:
                continue
            with _noted(skeleton, index) as names:
                made = layer(hidden, *call.args, **call.kwargs)
            hidden = _hidden(skeleton, index, made, hidden)
            called[kinds[index]] = called.get(kinds[index], set()) | names
        last = hidden
        given = _reads(lambda project: stubs.finish(ids, last, project))
        _compare(skeleton, expected, given)
        # Experts that no token was routed to haven't run yet.
        for index in [i for i in chosen if skeleton.experts(i)]:
            call = calls[index]
            with ExitStack() as stack:
                for experts in skeleton.experts(index).values():
                    stack.enter_context(experts.all_tokens())
                with _noted(skeleton, index) as names:
                    skeleton.layers[index](hidden, *call.args, **call.kwargs)
            called[kinds[index]] |= names
    return {
        f"{skeleton.layer_name(index)}.{name}"
        for index, kind in enumerate(kinds)
        for name in called[kind]
    }


def _kinds(skeleton: Skeleton) -> list[Any]:
    """The names and shapes of each layer's parameters."""
    return [
        tuple((name, value.shape) for name, value in layer.named_parameters())
        for layer in skeleton.layers
    ]


def _chosen(kinds: list[Any]) -> list[int]:
    """The numbers of the first layers of each kind."""
    return [n for n, kind in enumerate(kinds) if kinds[:n].count(kind) < _OF_A_KIND]


def _reads(run: Callable[[Callable[[Tensor], Tensor]], Any]) -> Tensor:
    """What the output embedding reads in ``run``, which gets the function to put in its place."""
    seen: list[Tensor] = []

    def project(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        raise Stop

    with suppress(Stop):
        run(project)
    return seen[0]


def _compare(skeleton: Skeleton, expected: Tensor, given: Tensor) -> None:
    if not bool(expected.isfinite().all()):
        raise InputError(
            f"{type(skeleton.model).__name__} with this config.json computes numbers that aren't "
            "finite, tried with small random weights",
            where=str(skeleton.directory),
            fix="Does the model give text in transformers? Is its config.json right (rope_theta, "
            "rms_norm_eps, dtype)?",
        )
    near = expected.shape == given.shape and bool(
        (expected - given).abs().max() <= _TOLERANCE * expected.abs().max()
    )
    if not near:
        raise InputError(
            f"the layers of {type(skeleton.model).__name__}, run one by one, don't give what the "
            "model computes: more passes between them than hidden states",
            where=str(skeleton.directory),
        )


@contextmanager
def _watched(skeleton: Skeleton) -> Iterator[None]:
    """Raise InputError where what a layer gives differs by what another returned beside its hidden
    states. Some return more than the next one needs, such as tokens to attend to."""
    returned: list[Tensor] = []
    without: dict[nn.Module, Any] = {}

    def lacks(value: Any) -> bool:
        return any(value is other for other in returned)

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(map(lacks, (*args, *kwargs.values()))):
            bare = [None if lacks(value) else value for value in args]
            named = {name: None if lacks(value) else value for name, value in kwargs.items()}
            try:
                without[layer] = layer.forward(*bare, **named)
            except FAILURES:
                without[layer] = None

    def after(layer: nn.Module, _: Any, output: Any) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        if layer in without:
            made = without.pop(layer)
            other = made[0] if isinstance(made, tuple) else made
            if other is None or not torch.equal(parts[0], other):
                raise InputError(
                    f"the layers of {type(skeleton.model).__name__} can't be run one by one: each "
                    f"{type(layer).__name__} needs more of the one before than its hidden states",
                    where=str(skeleton.directory),
                )
        returned.extend(value for value in parts[1:] if isinstance(value, Tensor))

    with ExitStack() as stack:
        for layer in skeleton.layers:
            stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(after).remove)
        yield


@contextmanager
def _noted(skeleton: Skeleton, index: int) -> Iterator[set[str]]:
    """The names of the linears of a layer that are called meanwhile."""
    called: set[str] = set()

    def note(name: str) -> Callable[..., None]:
        return lambda *_: called.add(name)

    with ExitStack() as stack:
        for name, linear in skeleton.linears(index).items():
            stack.callback(linear.register_forward_pre_hook(note(name)).remove)
        yield called


def _hidden(skeleton: Skeleton, index: int, output: Any, before: Tensor) -> Tensor:
    made = output[0] if isinstance(output, tuple) else output
    if not isinstance(made, Tensor) or made.shape != before.shape:
        raise InputError(
            f"{skeleton.layer_name(index)} ({type(skeleton.layers[index]).__name__}) doesn't give "
            "hidden states, so the layers can't be run one by one",
            where=str(skeleton.directory),
        )
    return made


@contextmanager
def _random(model: nn.Module, towers: tuple[str, ...]) -> Iterator[None]:
    """Let all parameters but those of ``towers`` be random ones that take little memory."""
    generator = torch.Generator().manual_seed(0)
    apart = tuple(f"{name}." for name in towers)
    kept: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for name, module in model.named_modules():
            if f"{name}.".startswith(apart):
                continue
            for leaf, value in module._parameters.items():
                if value is not None:
                    kept.append((module._parameters, leaf, value))
                    small = _overlapping(value, generator)
                    module._parameters[leaf] = nn.Parameter(small, requires_grad=False)
            for leaf, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    kept.append((module._buffers, leaf, buffer))
                    module._buffers[leaf] = torch.zeros(buffer.shape, dtype=buffer.dtype)
        yield
    finally:
        for place, leaf, value in kept:
            place[leaf] = value


def _overlapping(value: Tensor, generator: torch.Generator) -> Tensor:
    """Random values of the shape and dtype of ``value``: element (i, j, …) is number i + j + … of
    a row of so many."""
    if not value.is_floating_point():
        return torch.zeros(value.shape, dtype=value.dtype)
    length = max(1, sum(value.shape) - value.dim() + 1)
    numbers = torch.randn(length, generator=generator)
    if value.dim() < 2:  # of norms and biases
        return (1 + numbers[: value.numel()] / 8).to(value.dtype).view(value.shape)
    numbers = (numbers / math.sqrt(value.shape[-1])).to(value.dtype)
    return numbers.as_strided(value.shape, [1] * value.dim())
