"""An artifact with some places restored to the baseline's weights, ranked and measured."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.checkpoint.weights import TensorSource
from quantkit.judging.likelihood import (
    TOKENS_PER_BATCH,
    Divergence,
    FinalStates,
    columns_per_slice,
    compare_predictions,
    final_states,
    tokens_per_batch,
)
from quantkit.judging.places import Place, is_rescaled, layer_places, outer_places, recorded
from quantkit.model.skeleton import Skeleton
from quantkit.model.stream import Batch, Stream, slices

Step = Callable[[], None]


class Localizer:
    """An artifact and its baseline on the same rows of tokens, both in float32."""

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
        """Runs the baseline; ``step`` is called after each of its layers.

        skeletons: two of the same model in float32, of which each side needs one; rows: (rows,
        tokens); rescaled: whether weights are known to be scaled against each other. Norms that
        differ from the baseline's show it too.
        """
        baseline_skeleton, self.skeleton = skeletons
        self.rows, self.device, self.artifact, self.baseline = rows, device, artifact, baseline
        # By the keys that experts have, also where one tensor is for all.
        self._weights = self.skeleton.viewed(baseline)
        stored = self.skeleton.viewed(artifact)
        self._rescaled = rescaled or is_rescaled(stored, self._weights, self.skeleton)
        self.batch_size = max(1, tokens_per_batch(device) // rows.shape[1])
        self._reference = final_states(Stream(baseline_skeleton, baseline, device), rows, step)

    @property
    def steps(self) -> tuple[int, int]:
        """How many steps one pass over the layers takes, and one comparison of predictions."""
        vocabulary = self.skeleton.model.get_output_embeddings().weight.shape[0]
        return len(self.skeleton.layers), len(
            list(slices(vocabulary, columns_per_slice(self.device)))
        )

    def rank(self, step: Step = lambda: None) -> list[Place]:
        """Every place that differs from the baseline, in order of falling error.

        The error is the mean over the tokens of one batch of ‖Δh‖² / ‖h‖², where h is the output
        of the artifact's layer on its own input, and Δh its change when the place is restored.
        Outside the layers it is ‖Ŵ − W‖² / ‖W‖² of the weights. ``step`` is called after each
        layer.
        """
        stream = Stream(self.skeleton, self.artifact, self.device)
        few = max(1, TOKENS_PER_BATCH // self.rows.shape[1])  # the same on every device
        (batch,) = stream.begin(self.rows[:few], few)
        places = list(outer_places(self.skeleton, self.artifact, self.baseline))
        for index in range(len(self.skeleton.layers)):
            with stream.block(index) as block:
                with recorded(block) as traffic:
                    output = stream.run(index, block, batch, batch.hidden)
                known = layer_places(self.skeleton, index, traffic, rescaled=self._rescaled)
                inside = list(known)
                errors = []  # read together: reading one makes a GPU wait
                for place in inside:
                    with self.restored(block, place):
                        other = stream.run(index, block, batch, batch.hidden)
                    change = (other - output).square().sum(-1) / output.square().sum(-1)
                    errors.append(change.mean())
                numbers = torch.stack(errors).tolist() if errors else []
                for place, error in zip(inside, numbers, strict=True):
                    places.append(replace(place, error=error if math.isfinite(error) else math.inf))
                batch.hidden = output
            step()
        return sorted((p for p in places if p.error > 0), key=lambda p: -p.error)

    def measure(
        self, trials: Sequence[Sequence[Place]], step: Step = lambda: None
    ) -> list[Divergence]:
        """For each trial, the artifact with its places restored, compared with the baseline.

        ``step`` is called after each layer, and after each slice of each trial's vocabulary.
        """
        # One pass over the weights serves all trials, and a trial runs on the artifact's own
        # hidden states up to the first layer that it changes.
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
            compare_predictions(
                self._reference, FinalStates(run.stream or stream, run.batches or shared), step
            )
            for run in runs
        ]

    @contextmanager
    def restored(self, block: nn.Module, *places: Place) -> Iterator[None]:
        """``block`` with the baseline's parameters in these places, which are all of its layer.

        Their modules' pre-hooks, by which linears round their inputs, don't run meanwhile.
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
                    value = self._weights.read(self.skeleton.key(name)).to(old.device, old.dtype)
                    held[leaf] = nn.Parameter(value, requires_grad=False)
            yield
        finally:
            for held, leaf, old in reversed(kept):
                held[leaf] = old


class _Trial:
    """The artifact with some places restored, layer by layer.

    batches: its hidden states, None as long as they are the artifact's own; stream: None unless
    an embedding or the head is restored.
    """

    def __init__(self, localizer: Localizer, places: Sequence[Place]) -> None:
        self._localizer = localizer
        self._inside = [place for place in places if place.layer is not None]
        self.stream: Stream | None = None
        self.batches: list[Batch] | None = None
        outside = [place for place in places if place.layer is None]
        if outside:
            keys = [localizer.skeleton.key(name) for p in outside for name in p.parameters]
            source = _Restored(localizer.artifact, localizer.baseline, keys)
            self.stream = Stream(localizer.skeleton, source, localizer.device)
            self.batches = self.stream.begin(localizer.rows, localizer.batch_size)

    def advance(self, index: int, block: nn.Module, stream: Stream, shared: list[Batch]) -> None:
        """Run layer ``index`` on hidden states of its own, if it has any or they begin here.

        ``shared``: the artifact's hidden states before the layer.
        """
        here = [place for place in self._inside if place.layer == index]
        if self.batches is None and here:
            self.batches = [replace(batch) for batch in shared]
        if self.batches is not None:
            with self._localizer.restored(block, *here):
                stream.advance(index, block, self.batches)


class _Restored:
    """``artifact`` with the tensors ``keys`` of ``baseline``. Implements ``TensorSource``."""

    def __init__(
        self, artifact: TensorSource, baseline: TensorSource, keys: Collection[str]
    ) -> None:
        self._artifact, self._baseline, self._keys = artifact, baseline, frozenset(keys)

    def keys(self) -> Iterable[str]:
        return self._artifact.keys()

    def read(self, key: str) -> Tensor:
        return self._source(key).read(key)

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        return self._source(key).read_rows(key, start, stop)

    def _source(self, key: str) -> TensorSource:
        return self._baseline if key in self._keys else self._artifact
