"""Folds: where the inverse of an input's scale can be applied, found by trial on the block itself.

AWQ and SmoothQuant multiply the columns of linears' weights by a scale s, one factor for each input
feature. The block computes the same as before if these features are divided by s where they are
made: in the weight of the norm before the linears, or in the rows of an earlier linear (v_proj
before o_proj, up_proj before down_proj).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quantkit.model.experts import Experts
from quantkit.model.stubs import Call

# Relative to the largest output. Only norms that multiply by 1 + w need it: dividing 1 + w by a
# power of two and subtracting 1 again rounds.
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Fold:
    """One input that may be rescaled, and the module that makes it.

    producer: name of that module within the block; kind: how its weight is divided by a scale (a
    norm that multiplies by w, a norm that multiplies by 1 + w, the rows of a linear); consumers:
    every linear that reads the input, quantized or not, and of a mixture of experts what else has
    a weight and reads it (its router); repeat: how many times each head of the
    producer is read (grouped-query attention), with ``head_size`` features a head.
    """

    producer: str
    kind: Literal["norm", "norm_plus_one", "linear"]
    consumers: tuple[str, ...]
    repeat: int = 1
    head_size: int = 0

    def expand(self, scale: Tensor) -> Tensor:
        """The producer's scale (its out_features,) as the consumers see it, (in_features,)."""
        if self.repeat == 1:
            return scale
        heads = scale.view(-1, self.head_size)
        return heads.repeat_interleave(self.repeat, 0).flatten()

    def reduce(self, scale: Tensor) -> Tensor:
        """The producer's scale nearest to a scale of the consumers, (in_features,).

        It is the geometric mean over the repetitions of each head.
        """
        if self.repeat == 1:
            return scale
        return scale.log().view(-1, self.repeat, self.head_size).mean(1).exp().flatten()

    def narrow(self, scale: Tensor) -> Tensor:
        """Inverse of ``expand``, for a scale that is equal in all repetitions of a head."""
        if self.repeat == 1:
            return scale
        return scale.view(-1, self.repeat, self.head_size)[:, 0].flatten()

    def divide(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The producer's weight, changed so that its outputs are divided by ``scale``."""
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
    """One fold for each group of linears that read the same tensor, where there is one.

    groups: names of linears within ``block``; call, hidden (rows, tokens, features): the arguments
    that the block is run on; kv_heads: of attention, where the model has such a number; known: the
    folds of the block before. The result is in the order of ``groups``, but begins with what a
    mixture of experts reads, which are several groups.
    """
    probe = _Probe(block, call, hidden)
    # The blocks of a model are mostly alike, so one forward proves all of the known folds.
    every = {tuple(group) for group in groups} | {fold.consumers for fold in probe.shared}
    if known and {fold.consumers for fold in known} <= every and probe.holds(known):
        return list(known)
    folds = [fold for fold in probe.shared if probe.holds([fold])]
    covered = {name for fold in folds for name in fold.consumers}
    left = [tuple(consumers) for consumers in groups if not covered >= set(consumers)]
    while left:
        consumers = left.pop(0)
        for candidate in _candidates(probe, consumers, kv_heads):
            if not probe.holds([candidate]):
                continue
            folds.append(candidate)
            # Experts are alike, and there may be hundreds: what holds for one is tried for all.
            alike = _alike(candidate, left)
            if alike and probe.holds(alike):
                folds += alike
                found = {fold.consumers for fold in alike}
                left = [others for others in left if others not in found]
            break
    # Each fold holds by itself, but together they may interfere.
    if folds and not probe.holds(folds):
        return []
    return folds


class _Probe:
    """A float32 copy of a block, its arguments, and the output that no fold may change.

    order: names of the modules that have a weight, as they are executed; shared: possible folds of
    what the experts of a mixture read, which its router and shared experts read too.
    """

    # Nothing is known of the architecture: a table of who feeds whom would have to name every
    # family of models, and would be wrong for the next one. Instead candidates are scaled by
    # random powers of two, whose products are exact in floating point, so that a real fold leaves
    # the output equal bit for bit, and anything else changes it.

    def __init__(self, block: nn.Module, call: Call, hidden: Tensor) -> None:
        # In float32, so that norms which multiply by 1 + w stay far within the tolerance.
        self.block = copy.deepcopy(block).float()
        self.call = Call(_to_float(call.args), _to_float(call.kwargs))
        self.hidden = hidden.float()
        self.generator = torch.Generator().manual_seed(0)
        for module in self.block.modules():
            if isinstance(module, Experts):
                # Or an expert that no token of the probe is routed to would prove any fold.
                module.everyone = True
        self.order: list[str] = []
        self._seen: list[tuple[str, Any, Any]] = []  # names, what they read, what they gave
        handles = [
            module.register_forward_hook(self._note(name))
            for name, module in self.block.named_modules()
            if name and (_weight(module) is not None or isinstance(module, Experts))
        ]
        self.reference = self._run()
        for handle in handles:
            handle.remove()
        self.order = [name for name, _, _ in self._seen if not self._experts(name)]
        self.shared = list(self._shared())
        self._seen.clear()

    def _note(self, name: str) -> Callable[..., None]:
        # The tensors are kept until all have been seen, so that no two are at the same place.
        return lambda _, given, made: self._seen.append((name, given[:1], made))

    def _experts(self, name: str) -> Experts | None:
        module = self.block.get_submodule(name)
        return module if isinstance(module, Experts) else None

    def _shared(self) -> Iterator[Fold]:
        """For each mixture the norm whose output it reads, with all that reads the same."""
        for name, read, _ in self._seen:
            if self._experts(name) is None:
                continue
            readers = [other for other, given, _ in self._seen if _same(given, read)]
            norms = [other for other, _, made in self._seen if _same((made,), read)]
            consumers: list[str] = []
            for reader in readers:
                mixture = self._experts(reader)
                if mixture is None:
                    consumers.append(reader)
                    continue
                for number, pieces in enumerate(mixture.pieces):
                    consumers += [f"{reader}.{number}.{p.leaf}" for p in pieces[mixture.first]]
            for norm in norms:
                # A norm that multiplies by 1 + w would round, and so could change the routing.
                if self.block.get_parameter(f"{norm}.weight").ndim == 1:
                    yield Fold(norm, "norm", tuple(consumers))

    @torch.inference_mode()
    def _run(self) -> list[Tensor]:
        """The block's output, and what the routers gave to mixtures of experts."""
        routed: list[Tensor] = []
        handles = [
            module.register_forward_pre_hook(lambda _, given: routed.extend(given[1:3]))
            for module in self.block.modules()
            if isinstance(module, Experts)
        ]
        output = self.block(self.hidden, *self.call.args, **self.call.kwargs)
        for handle in handles:
            handle.remove()
        return [output[0] if isinstance(output, tuple) else output, *routed]

    def holds(self, folds: Sequence[Fold]) -> bool:
        """Whether the block's output stays the same under random scales of all ``folds``."""
        # A linear may consume one fold and produce for another: the first value seen is its own.
        originals: dict[str, Tensor] = {}

        def change(module: str, leaf: str, function: Callable[[Tensor], Tensor]) -> None:
            parameter = getattr(self.block.get_submodule(module), leaf, None)
            if parameter is not None:
                originals.setdefault(f"{module}.{leaf}", parameter.data)
                parameter.data = function(parameter.data)

        for fold in folds:
            width = self.block.get_parameter(f"{fold.producer}.weight").shape[0]
            # Random, so that no wrong fold passes by chance, and small, so that nothing overflows.
            powers = torch.randint(-2, 3, (width,), generator=self.generator)
            scale = torch.exp2(powers.float()).to(self.hidden.device)
            expanded = fold.expand(scale)
            change(fold.producer, "weight", partial(fold.divide, scale=scale))
            change(fold.producer, "bias", partial(torch.mul, other=1 / scale))
            for consumer in fold.consumers:
                change(consumer, "weight", partial(torch.mul, other=expanded))
        try:
            output = self._run()
        finally:
            for name, tensor in originals.items():
                self.block.get_parameter(name).data = tensor
        pairs = list(zip(output, self.reference, strict=True))
        # One such norm among the folds rounds the whole output.
        if any(fold.kind == "norm_plus_one" for fold in folds):
            return all(
                bool((now - before).abs().max() <= _TOLERANCE * before.abs().max())
                for now, before in pairs
            )
        return all(torch.equal(now, before) for now, before in pairs)


def _candidates(probe: _Probe, consumers: tuple[str, ...], kv_heads: int | None) -> list[Fold]:
    """Possible folds; those of the nearest module before the first consumer come first."""
    modules = dict(probe.block.named_modules())
    width = modules[consumers[0]].weight.shape[1]
    # Only what runs before the first consumer can make its input.
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
            out = weight.shape[0]
            if out == width:
                candidates.append(Fold(name, "linear", consumers))
            # Grouped-query attention: o_proj reads each head of v_proj several times.
            elif kv_heads and out < width and width % out == 0 and out % kv_heads == 0:
                candidates.append(Fold(name, "linear", consumers, width // out, out // kv_heads))
    return candidates


def _alike(fold: Fold, groups: Sequence[tuple[str, ...]]) -> list[Fold]:
    """The same fold of other experts: of ``groups`` whose names differ in one number."""
    found = []
    for consumers in groups:
        changes = {
            (part, other)
            for name, like in zip(fold.consumers, consumers, strict=False)
            for part, other in zip(name.split("."), like.split("."), strict=False)
            if part != other
        }
        if len(consumers) != len(fold.consumers) or len(changes) != 1:
            continue
        [(number, other)] = changes
        parts = fold.producer.split(".")
        if number.isdecimal() and other.isdecimal() and parts.count(number) == 1:
            producer = ".".join(other if part == number else part for part in parts)
            found.append(replace(fold, producer=producer, consumers=consumers))
    return found


def _weight(module: nn.Module) -> Tensor | None:
    value = getattr(module, "weight", None)
    return value if isinstance(value, nn.Parameter) else None


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether both are the same values in the same memory, whatever their shape."""
    if not (one and other and isinstance(one[0], Tensor) and isinstance(other[0], Tensor)):
        return False
    return one[0].data_ptr() == other[0].data_ptr() and one[0].numel() == other[0].numel()


def _to_float(value: Any) -> Any:
    """A layer's arguments with their floats in float32: masks, rotary embeddings, not positions."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, MutableMapping):  # a copy: a probe must not change what layers share
        result = copy.copy(value)
        result.update({key: _to_float(item) for key, item in value.items()})
        return result
    if isinstance(value, (list, tuple)):
        return type(value)(_to_float(item) for item in value)
    return value
