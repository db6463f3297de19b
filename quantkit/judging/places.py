"""The places of an artifact: what can get the baseline's weights back by itself.

A place is what a recipe can treat by itself: a linear, several linears that engines load as one
matrix, or an embedding. Methods such as AWQ scale weights against each other. There a place is all
that is scaled together: the linears of one parent module, and the norms that they read. Experts
read one norm, so all of a mixture are one place, with their router and shared experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.checkpoint.weights import TensorSource
from quantkit.model.skeleton import Skeleton
from quantkit.model.stream import slices
from quantkit.plan.candidates import fused

_TOLERANCE = 1e-3  # GGUF stores norms in float32, and Gemma's as 1 + w


@dataclass(frozen=True)
class Place:
    """A place, and how much it changes the output of its layer.

    modules: full names of its linears or embeddings; parameters: full names of all parameters to
    restore, with those of the norms; layer: None outside the layers; error: predicted, see
    ``Localizer.rank``.
    """

    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    layer: int | None
    error: float = 0.0


def is_rescaled(artifact: TensorSource, baseline: TensorSource, skeleton: Skeleton) -> bool:
    """Whether a norm or a bias inside the layers differs from the baseline's.

    Methods that scale weights against each other divide what a norm or a linear puts out, and
    multiply the weights that read it.
    """
    vectors = {
        skeleton.key(name)
        for name, parameter in skeleton.model.named_parameters()
        if parameter.ndim == 1 and name.startswith(skeleton.prefix + ".")
    }
    return any(
        not torch.allclose(
            artifact.read(key).float(), baseline.read(key).float(), rtol=_TOLERANCE, atol=_TOLERANCE
        )
        for key in sorted(vectors)
    )


@dataclass(frozen=True)
class Traffic:
    """The first input and the output of each module of a block, by its name within the block."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Any]

    def feeding(self, readers: Sequence[str]) -> list[str]:
        """The other modules whose output, the very tensor, is the input of one of ``readers``."""
        read = {self.inputs[name].data_ptr() for name in readers}
        return [
            name
            for name, output in self.outputs.items()
            if isinstance(output, Tensor) and output.data_ptr() in read and name not in readers
        ]


@contextmanager
def recorded(block: nn.Module) -> Iterator[Traffic]:
    """The traffic of the modules of ``block`` that have parameters of their own."""
    traffic = Traffic({}, {})

    def before(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: traffic.inputs.update({name: args[0]} if args else {})

    def after(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, output: traffic.outputs.update({name: output})

    handles = []
    for name, module in block.named_modules():
        if name and module._parameters:
            # First of all hooks: those that round inputs would pass on another tensor.
            handles.append(module.register_forward_pre_hook(before(name), prepend=True))
            handles.append(module.register_forward_hook(after(name)))
    try:
        yield traffic
    finally:
        for handle in handles:
            handle.remove()


def layer_places(
    skeleton: Skeleton, index: int, traffic: Traffic, *, rescaled: bool
) -> Iterator[Place]:
    """The places of layer ``index``, among the linears that were run.

    rescaled: whether weights are scaled against each other.
    """
    prefix = skeleton.layer_name(index) + "."
    mixtures = [name.rpartition(".")[0] for name in skeleton.experts(index)]
    inside = tuple(f"{name}." for name in mixtures if rescaled)
    # What experts read is scaled for all of them, also for those that none of these tokens reached.
    linears = [
        name
        for name in skeleton.linears(index)
        if name in traffic.inputs or (inside and name.startswith(inside))
    ]
    for modules in _by_parent(linears, mixtures) if rescaled else fused(linears):
        owners = list(modules)
        if rescaled:
            parent = f"{_parent(modules[0], mixtures)}."
            beside = [name for name in traffic.inputs if name.startswith(parent)]
            owners += [name for name in beside if parent in inside and name not in modules]
            owners += traffic.feeding([name for name in owners if name in traffic.inputs])
        parameters = tuple(
            name
            for owner in owners
            for name in skeleton.names
            if name.rpartition(".")[0] == prefix + owner
        )
        names = [prefix + name for name in modules]
        yield Place(tuple(names), parameters, index)


def outer_places(
    skeleton: Skeleton, artifact: TensorSource, baseline: TensorSource
) -> Iterator[Place]:
    """The embeddings and heads, with their errors; tied ones are one place."""
    seen = set()
    for name, module in skeleton.model.named_modules():
        outside = not name.startswith(skeleton.prefix + ".")
        if outside and isinstance(module, nn.Embedding | nn.Linear):
            key = skeleton.key(f"{name}.weight")
            if key not in seen:
                error = _weight_error(artifact, baseline, key, module.weight.shape[0])
                yield Place((name,), (f"{name}.weight",), None, error)
            seen.add(key)


def _weight_error(artifact: TensorSource, baseline: TensorSource, key: str, rows: int) -> float:
    """‖Ŵ − W‖² / ‖W‖² of a matrix, some rows at a time."""
    lost = energy = 0.0
    for part in slices(rows):
        weight = baseline.read_rows(key, part.start, part.stop).float()
        stored = artifact.read_rows(key, part.start, part.stop).float()
        lost += (stored - weight).square().sum(dtype=torch.float64).item()
        energy += weight.square().sum(dtype=torch.float64).item()
    return lost / max(energy, 1e-30)


def _by_parent(names: Iterable[str], mixtures: Sequence[str]) -> list[tuple[str, ...]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_parent(name, mixtures), []).append(name)
    return [tuple(group) for group in groups.values()]


def _parent(name: str, mixtures: Sequence[str]) -> str:
    """The module that a linear is in: of an expert the one that has the whole mixture."""
    inside = (parent for parent in mixtures if name.startswith(f"{parent}."))
    return next(inside, name.rpartition(".")[0])
