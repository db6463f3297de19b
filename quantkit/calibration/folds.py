"""Which linears' inputs may be rescaled, found by trying and proven on the block itself.

A scale s on the input features of a linear is undone exactly where those features are made: the
weight of the norm before it is divided by s, or the rows of an earlier linear (v before o, up
before down). Nothing is known of the architecture. Every earlier norm or linear of fitting width
is tried with random powers of two, whose products are exact in floating point: if the block's
output stays equal bit for bit, the fold is real. Norms that multiply by 1 + w round, so there a
small tolerance decides.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quantkit.model.stubs import Call

_TOLERANCE = 1e-5  # relative to the largest output, for norms that multiply by 1 + w


@dataclass(frozen=True)
class Fold:
    """Where the scale of one input can be undone.

    producer: name of the module within the block; kind: how its weight is divided;
    consumers: every linear that reads the input, quantized or not; repeat: how many times each
    head of the producer is read (grouped-query attention), with ``head_size`` features a head.
    """

    producer: str
    kind: Literal["norm", "norm_plus_one", "linear"]
    consumers: tuple[str, ...]
    repeat: int = 1
    head_size: int = 0

    def expand(self, scale: Tensor) -> Tensor:
        """Producer's scale (out_features of the producer) → consumers' scale (in_features)."""
        if self.repeat == 1:
            return scale
        heads = scale.view(-1, self.head_size)
        return heads.repeat_interleave(self.repeat, 0).flatten()

    def reduce(self, scale: Tensor) -> Tensor:
        """Consumers' scale → producer's: the geometric mean over the heads that share one."""
        if self.repeat == 1:
            return scale
        return scale.log().view(-1, self.repeat, self.head_size).mean(1).exp().flatten()

    def narrow(self, scale: Tensor) -> Tensor:
        """Inverse of ``expand``."""
        if self.repeat == 1:
            return scale
        return scale.view(-1, self.repeat, self.head_size)[:, 0].flatten()

    def divide(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The producer's weight (or bias) with its outputs divided by ``scale``."""
        if self.kind == "norm_plus_one":
            return (1 + weight) / scale - 1
        return weight / (scale[:, None] if weight.ndim == 2 else scale)


def find_folds(
    block: nn.Module,
    groups: Sequence[Sequence[str]],
    call: Call,
    hidden: Tensor,
    kv_heads: int | None,
    known: Sequence[Fold] = (),
) -> list[Fold]:
    """Find one fold for each group of linears that read the same tensor, where there is one.

    ``call`` and ``hidden`` (rows, tokens, features) are what the block is run on. ``known`` are
    the folds of a sister block: when all of them hold here too, one forward proves it and
    nothing is searched. Folds come in the order of ``groups``.
    """
    probe = _Probe(block, call, hidden)
    if known and {f.consumers for f in known} <= {tuple(g) for g in groups} and probe.holds(known):
        return list(known)
    found = []
    for consumers in groups:
        for candidate in _candidates(probe, tuple(consumers), kv_heads):
            if probe.holds([candidate]):
                found.append(candidate)
                break
    if found and not probe.holds(found):  # each alone is right, but together they interfere
        return []
    return found


class _Probe:
    """A float32 copy of a block, its input, and the output that must not change."""

    def __init__(self, block: nn.Module, call: Call, hidden: Tensor) -> None:
        self.block = copy.deepcopy(block).float()
        self.call = Call(_to_float(call.args), _to_float(call.kwargs))
        self.hidden = hidden.float()
        self.generator = torch.Generator().manual_seed(0)
        self.order: list[str] = []
        handles = [
            module.register_forward_hook(self._note(name))
            for name, module in self.block.named_modules()
            if name and getattr(module, "weight", None) is not None
        ]
        self.reference = self._run()
        for handle in handles:
            handle.remove()

    def _note(self, name: str) -> Callable[..., None]:
        return lambda *_: self.order.append(name)

    @torch.inference_mode()
    def _run(self) -> Tensor:
        output = self.block(self.hidden, *self.call.args, **self.call.kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def holds(self, folds: Sequence[Fold]) -> bool:
        """Whether the block's output stays what it was under random scales on ``folds``."""
        originals: dict[str, Tensor] = {}

        def change(module: str, leaf: str, function: Callable[[Tensor], Tensor]) -> None:
            parameter = getattr(self.block.get_submodule(module), leaf, None)
            if parameter is not None:
                originals.setdefault(f"{module}.{leaf}", parameter.data)
                parameter.data = function(parameter.data)

        for fold in folds:
            width = self.block.get_parameter(f"{fold.producer}.weight").shape[0]
            powers = torch.randint(-2, 3, (width,), generator=self.generator)
            scale = torch.exp2(powers.float()).to(self.hidden.device)
            wide = fold.expand(scale)
            change(fold.producer, "weight", partial(fold.divide, scale=scale))
            change(fold.producer, "bias", partial(torch.mul, other=1 / scale))
            for consumer in fold.consumers:
                change(consumer, "weight", partial(torch.mul, other=wide))
        try:
            output = self._run()
        finally:
            for name, tensor in originals.items():
                self.block.get_parameter(name).data = tensor
        if any(fold.kind == "norm_plus_one" for fold in folds):
            limit = _TOLERANCE * self.reference.abs().max()
            return bool((output - self.reference).abs().max() <= limit)
        return torch.equal(output, self.reference)


def _candidates(probe: _Probe, consumers: tuple[str, ...], kv_heads: int | None) -> list[Fold]:
    """Possible producers, the nearest before the first consumer first."""
    modules = dict(probe.block.named_modules())
    width = modules[consumers[0]].weight.shape[1]
    earlier = []
    for name in probe.order:
        if name in consumers:
            break
        earlier.append(name)
    candidates = []
    for name in reversed(earlier):
        weight = modules[name].weight
        if weight.ndim == 1 and weight.shape[0] == width:
            candidates.append(Fold(name, "norm", consumers))
            candidates.append(Fold(name, "norm_plus_one", consumers))
        elif isinstance(modules[name], nn.Linear):
            made = weight.shape[0]
            if made == width:
                candidates.append(Fold(name, "linear", consumers))
            elif kv_heads and made < width and width % made == 0 and made % kv_heads == 0:
                candidates.append(Fold(name, "linear", consumers, width // made, made // kv_heads))
    return candidates


def _to_float(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _to_float(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_float(item) for item in value)
    return value
