"""A model's layers run once without its weights, to see that they can be and what they run.

Every parameter is a zero that is shown as a whole tensor, so that this takes neither a checkpoint's
bytes nor memory, and a plan can refuse what the work couldn't do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.base.errors import InputError
from quantkit.model.refusals import running
from quantkit.model.skeleton import Skeleton
from quantkit.model.stubs import FAILURES, Call, Stubs

_TOKENS = 8


@torch.inference_mode()
def linears_that_run(skeleton: Skeleton) -> set[str]:
    """Full names of the layers' linears that are called when text runs through the model.

    A model may use a linear's weight without calling it, as state-space layers do with dt_proj.
    Layers whose parameters have the same names and shapes are taken to be alike. Raises InputError
    where the layers can't be run one by one.
    """
    ran: set[str] = set()
    ids = torch.arange(_TOKENS)[None] % skeleton.config.get_text_config().vocab_size
    with _zeros(skeleton.model, skeleton.towers):
        hidden, calls = Stubs(skeleton).record(ids)
        try:
            _run(skeleton, hidden, calls, ran, every=False)
        except FAILURES:
            # A layer may read what an earlier one has left behind.
            with running(skeleton.model, skeleton.directory):
                _run(skeleton, hidden, calls, ran, every=True)
    return ran


def _run(
    skeleton: Skeleton, hidden: Tensor, calls: list[Call], ran: set[str], *, every: bool
) -> None:
    known: dict[Any, list[str]] = {}
    for index, (layer, call) in enumerate(zip(skeleton.layers, calls, strict=True)):
        prefix = skeleton.layer_name(index) + "."
        kind = tuple((name, value.shape) for name, value in layer.named_parameters())
        if kind not in known or every:
            called: list[str] = []
            with ExitStack() as stack:
                for name, linear in skeleton.linears(index).items():
                    hook = linear.register_forward_pre_hook(_note(called, name))
                    stack.callback(hook.remove)
                for experts in skeleton.experts(index).values():
                    stack.enter_context(experts.all_tokens())
                _check(skeleton, index, layer(hidden, *call.args, **call.kwargs), hidden)
            known[kind] = called
        ran.update(prefix + name for name in known[kind])


def _note(called: list[str], name: str) -> Callable[..., None]:
    return lambda *_: called.append(name)


def _check(skeleton: Skeleton, index: int, output: Any, hidden: Tensor) -> None:
    made = output[0] if isinstance(output, tuple) else output
    if not isinstance(made, Tensor) or made.shape != hidden.shape:
        raise InputError(
            f"{skeleton.layer_name(index)} ({type(skeleton.layers[index]).__name__}) doesn't give "
            "hidden states, so the layers can't be run one by one",
            where=str(skeleton.directory),
        )


@contextmanager
def _zeros(model: nn.Module, towers: tuple[str, ...]) -> Iterator[None]:
    """Let all parameters but those of ``towers`` be zeros that take no memory."""
    apart = tuple(f"{name}." for name in towers)
    kept: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for name, module in model.named_modules():
            if f"{name}.".startswith(apart):
                continue
            for leaf, value in module._parameters.items():
                if value is not None:
                    kept.append((module._parameters, leaf, value))
                    zero = torch.zeros((), dtype=value.dtype).expand(value.shape)
                    module._parameters[leaf] = nn.Parameter(zero, requires_grad=False)
            for leaf, value in module._buffers.items():
                if value is not None and value.is_meta:
                    kept.append((module._buffers, leaf, value))
                    module._buffers[leaf] = torch.zeros(value.shape, dtype=value.dtype)
        yield
    finally:
        for place, leaf, value in kept:
            place[leaf] = value
