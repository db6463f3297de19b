"""Linears that round their inputs, as the engines of an artifact do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quantkit.checkpoint.weights import RoundsInputs, TensorSource
from quantkit.model.skeleton import Skeleton


def round_inputs(
    skeleton: Skeleton, source: TensorSource, names: Iterable[str]
) -> list[RemovableHandle]:
    """Let the linears of the named weights round their inputs, where the source's engines do.

    Removing the returned handles ends it.
    """
    if not isinstance(source, RoundsInputs):
        return []
    handles = []
    for name in names:
        if name not in skeleton.names:  # made of several tensors
            continue
        rounding = source.input_rounding(skeleton.key(name))
        if rounding is not None:
            module = skeleton.model.get_submodule(name.removesuffix(".weight"))
            handles.append(module.register_forward_pre_hook(partial(_rounded, rounding)))
    return handles


def _rounded(
    rounding: Callable[[Tensor], Tensor], module: nn.Module, args: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    return rounding(args[0]), *args[1:]
