"""Where an artifact loses quality.

A place is what a recipe can treat by itself: a linear, several that engines load as one matrix,
or an embedding. Where the method has rescaled weights, which AWQ does, nothing less than all that
is scaled together can be put back: the linears of one parent module, which also hold the pairs
that are scaled against each other, and the norms that they read.

Places are ranked by their predicted error: the mean over held-out tokens of ‖Δh‖² / ‖h‖², with h
what a layer of the artifact makes of its own inputs, and Δh how that changes when the place is put
back to the baseline's weights. Outside the layers it is ‖Ŵ − W‖² / ‖W‖². What a place costs is then
measured: the artifact runs to its end with the place put back. All such trials share the
artifact's hidden states up to their first changed layer, and one pass over the weights serves them
all.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.checkpoint.reader import TensorSource
from quantkit.judging.likelihood import TOKENS_PER_BATCH, Divergence, Finished, compare, finish
from quantkit.judging.restoring import Restored, is_rescaled
from quantkit.model.skeleton import Skeleton
from quantkit.model.stream import Batch, Stream, slices
from quantkit.plan.linears import fused

Step = Callable[[], None]


@dataclass(frozen=True)
class Place:
    """modules: full names of linears or embeddings; parameters: what is put back, their norms'
    among them; layer: None outside the layers; error: predicted."""

    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    layer: int | None
    error: float = 0.0


class Localiser:
    """An artifact beside its baseline on the same rows (rows, tokens), both in float32."""

    def __init__(
        self,
        skeletons: tuple[Skeleton, Skeleton],
        baseline: TensorSource,
        artifact: TensorSource,
        rows: Tensor,
        device: torch.device,
        *,
        rescaled: bool,
        step: Step = lambda: None,
    ) -> None:
        """``skeletons``: two of the same model in float32, one a side; ``rescaled``: weights are
        known to be scaled (norms that were are seen without). ``step``: after each layer of the
        baseline.
        """
        theirs, self.skeleton = skeletons
        self.rows, self.device, self.artifact, self.baseline = rows, device, artifact, baseline
        self._rescaled = rescaled or is_rescaled(artifact, baseline, self.skeleton)
        self.batch_size = max(1, TOKENS_PER_BATCH // rows.shape[1])
        self._reference = finish(Stream(theirs, baseline, device), rows, step)

    @property
    def steps(self) -> tuple[int, int]:
        """Steps of a pass over the layers, and of one comparison of heads."""
        vocabulary = self.skeleton.model.get_output_embeddings().weight.shape[0]
        return len(self.skeleton.layers), len(list(slices(vocabulary)))

    def rank(self, step: Step = lambda: None) -> list[Place]:
        """Every place that differs from the baseline, the greatest error first."""
        stream = Stream(self.skeleton, self.artifact, self.device)
        (batch,) = stream.begin(self.rows[: self.batch_size], self.batch_size)
        places = list(self._outside())
        for index in range(len(self.skeleton.layers)):
            with stream.block(index) as block:
                with _noted(block) as traffic:
                    made = stream.run(index, block, batch, batch.hidden)
                for place in self._inside(index, traffic):
                    with self.put_back(block, place):
                        other = stream.run(index, block, batch, batch.hidden)
                    change = (other - made).square().sum(-1) / made.square().sum(-1)
                    error = change.mean().item()
                    error = error if math.isfinite(error) else math.inf
                    places.append(replace(place, error=error))
                batch.hidden = made
            step()
        return sorted((p for p in places if p.error > 0), key=lambda p: -p.error)

    def measure(
        self, trials: Sequence[Sequence[Place]], step: Step = lambda: None
    ) -> list[Divergence]:
        """The artifact with the places of each trial put back, against the baseline."""
        stream = Stream(self.skeleton, self.artifact, self.device)
        shared = stream.begin(self.rows, self.batch_size)
        runs = [_Trial(self, places) for places in trials]
        for index in range(len(self.skeleton.layers)):
            with stream.block(index) as block:
                for run in runs:
                    run.advance(index, block, stream, shared)
                if not all(run.batches for run in runs):
                    stream.advance(index, block, shared)
            step()
        return [
            compare(self._reference, Finished(run.stream or stream, run.batches or shared), step)
            for run in runs
        ]

    @contextmanager
    def put_back(self, block: nn.Module, *places: Place) -> Iterator[None]:
        """``block`` with the places' parameters, all of its layer, as the baseline has them.

        Linears that round their inputs don't meanwhile.
        """
        kept: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for place in places:
                prefix = self.skeleton.layer_name(place.layer or 0) + "."
                for name in place.parameters:
                    path, _, leaf = name.removeprefix(prefix).rpartition(".")
                    module = block.get_submodule(path)
                    kept.append((module.__dict__, "_forward_pre_hooks", module._forward_pre_hooks))
                    module._forward_pre_hooks = OrderedDict()
                    held = module._parameters
                    old = held[leaf]
                    assert old is not None
                    kept.append((held, leaf, old))
                    value = self.baseline.read(self.skeleton.key(name)).to(old.device, old.dtype)
                    held[leaf] = nn.Parameter(value, requires_grad=False)
            yield
        finally:
            for held, leaf, old in reversed(kept):
                held[leaf] = old

    def _inside(self, index: int, traffic: _Traffic) -> Iterator[Place]:
        prefix = self.skeleton.layer_name(index) + "."
        linears = [name for name in self.skeleton.linears(index) if name in traffic.inputs]
        group = _scaled_together if self._rescaled else fused
        for names in group([prefix + name for name in linears]):
            modules = [name.removeprefix(prefix) for name in names]
            owners = [*modules, *(traffic.feeding(modules) if self._rescaled else ())]
            parameters = tuple(
                name
                for owner in owners
                for name in self.skeleton.names
                if name.rpartition(".")[0] == prefix + owner
            )
            yield Place(tuple(names), parameters, index)

    def _outside(self) -> Iterator[Place]:
        """Embeddings and heads; tied ones are one place."""
        seen = set()
        for name, module in self.skeleton.model.named_modules():
            outside = not name.startswith(self.skeleton.prefix + ".")
            if outside and isinstance(module, nn.Embedding | nn.Linear):
                key = self.skeleton.key(f"{name}.weight")
                if key not in seen:
                    error = self._weight_error(key, module.weight.shape[0])
                    yield Place((name,), (f"{name}.weight",), None, error)
                seen.add(key)

    def _weight_error(self, key: str, rows: int) -> float:
        lost = energy = 0.0
        for part in slices(rows):
            weight = self.baseline.read_rows(key, part.start, part.stop).float()
            found = self.artifact.read_rows(key, part.start, part.stop).float()
            lost += (found - weight).square().sum(dtype=torch.float64).item()
            energy += weight.square().sum(dtype=torch.float64).item()
        return lost / max(energy, 1e-30)


class _Trial:
    """The artifact with some places put back. Until the first of them it is the artifact itself.

    batches: its own, once it has left the artifact's; stream: its own, where the embeddings or
    the head are put back.
    """

    def __init__(self, localiser: Localiser, places: Sequence[Place]) -> None:
        self._localiser = localiser
        self._inside = [place for place in places if place.layer is not None]
        self.stream: Stream | None = None
        self.batches: list[Batch] | None = None
        outside = [place for place in places if place.layer is None]
        if outside:
            keys = [localiser.skeleton.key(name) for p in outside for name in p.parameters]
            source = Restored(localiser.artifact, localiser.baseline, keys)
            self.stream = Stream(localiser.skeleton, source, localiser.device)
            self.batches = self.stream.begin(localiser.rows, localiser.batch_size)

    def advance(self, index: int, block: nn.Module, stream: Stream, shared: list[Batch]) -> None:
        """Carry its own batches through ``block``; leave the shared ones where it differs."""
        here = [place for place in self._inside if place.layer == index]
        if self.batches is None and here:
            self.batches = [replace(batch) for batch in shared]
        if self.batches is not None:
            with self._localiser.put_back(block, *here):
                stream.advance(index, block, self.batches)


@dataclass(frozen=True)
class _Traffic:
    """What modules of a block read and made, by their names within it."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Any]

    def feeding(self, readers: Sequence[str]) -> list[str]:
        """The other modules whose very output one of ``readers`` reads."""
        read = {self.inputs[name].data_ptr() for name in readers}
        return [
            name
            for name, made in self.outputs.items()
            if isinstance(made, Tensor) and made.data_ptr() in read and name not in readers
        ]


@contextmanager
def _noted(block: nn.Module) -> Iterator[_Traffic]:
    """What passes the modules that have parameters of their own, before inputs are rounded."""
    traffic = _Traffic({}, {})

    def before(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: traffic.inputs.update({name: args[0]} if args else {})

    def after(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, output: traffic.outputs.update({name: output})

    handles = []
    for name, module in block.named_modules():
        if name and module._parameters:
            handles.append(module.register_forward_pre_hook(before(name), prepend=True))
            handles.append(module.register_forward_hook(after(name)))
    try:
        yield traffic
    finally:
        for handle in handles:
            handle.remove()


def _scaled_together(names: Iterable[str]) -> list[tuple[str, ...]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    return [tuple(group) for group in groups.values()]
