"""One block in memory at a time.

The decoder layers' arguments (masks, rotary embeddings) are recorded once by stubs in the place of
the layers, during one cheap forward; afterwards each real layer is loaded, run on the hidden
states, and dropped. The head is run the same way: a forward in which the last stub gives back
the hidden states that the real layers made, and the output embedding is applied in slices of the
vocabulary, so that whatever the model does around them (final norm, scaling, soft caps) is done
by its own code.

The embeddings are never whole in memory: of the input's the rows of a batch's tokens are read, of
the output's one slice of the vocabulary.
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
from quantkit.checkpoint.views import ViewedSource
from quantkit.checkpoint.weights import TensorSource
from quantkit.model.parameters import Parameters
from quantkit.model.refusals import running
from quantkit.model.skeleton import Skeleton
from quantkit.model.stubs import Call, Stop, Stubs, hands_on, same_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Batch:
    """Rows on their way through the model: their token ids, their hidden states and each layer's
    arguments."""

    ids: Tensor  # (rows, tokens) int64
    hidden: Tensor  # (rows, tokens, hidden_size)
    calls: list[Call]


class Stream:
    """A model whose weights come from ``source`` block by block.

    Computes on ``device`` in the skeleton's dtype, and rounds the inputs of linears as the engines
    of ``source`` do. A block's weights are in memory while its context is entered; those of the
    next one are read in the background meanwhile.
    """

    def __init__(self, skeleton: Skeleton, source: TensorSource, device: torch.device) -> None:
        self.skeleton = skeleton
        self.source: TensorSource = skeleton.viewed(source)
        self.device = device
        for module in skeleton.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(device)
        self._parameters = Parameters(skeleton, self.source, device)
        self._stubs = Stubs(skeleton)
        self._ahead = Ahead()

    def begin(self, rows: Tensor, batch_size: int) -> list[Batch]:
        """Embed ``rows`` (rows, tokens) and record every layer's arguments."""
        return list(self.begin_each(rows, batch_size))

    def begin_each(
        self,
        rows: Tensor,
        batch_size: int,
        read_embedding: Callable[[int, int], Tensor] | None = None,
    ) -> Iterator[Batch]:
        """The same, one batch after the other.

        read_embedding: reads rows ``start`` to before ``stop`` of the input embedding, where they
        aren't the source's.
        """
        first: list[Call] = []
        if self.device.type != "cpu":
            self._read_ahead(0)
        table = self._parameters.embedding_table(rows, read_embedding)
        with self._parameters.loaded(self._parameters.outside_layers()):
            for ids in rows.to(self.device).split(batch_size):
                embedding = self._parameters.embedding_of(ids, read_embedding, table)
                with torch.inference_mode(), embedding:
                    hidden, calls = self._stubs.record(ids)
                if first and not hands_on(calls) and same_arguments(calls, first):
                    calls = first  # nearly always so: one copy of masks and rotations is kept
                first = first or calls
                yield Batch(ids, hidden, calls)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Layer ``index`` with its weights in memory."""
        names = self._parameters.of_layer(index)
        weights = self._ahead.result(index, partial(self._parameters.read, names))
        if index + 1 < len(self.skeleton.layers):
            self._read_ahead(index + 1)
        with self._parameters.loaded(names, weights):
            yield self.skeleton.layers[index]
        return_free_blocks()

    def _read_ahead(self, index: int) -> None:
        names = self._parameters.of_layer(index)
        source = self.source
        plain = isinstance(source, Checkpoint) or (
            isinstance(source, ViewedSource) and isinstance(source.source, Checkpoint)
        )
        on_cpu = self.device.type == "cpu"
        if isinstance(source, Checkpoint | ViewedSource) and plain and on_cpu:
            # The system's cache is enough for weights that are stored as they are used, and
            # doesn't count as memory of ours. Unpacking takes time, so it is done ahead. Another
            # device copies weights from memory that is made ready for it.
            source.expect(self._parameters.keys(names))
        else:
            self._ahead.start(index, partial(self._parameters.read, names))

    @torch.inference_mode()
    def run(self, index: int, block: nn.Module, batch: Batch, hidden: Tensor) -> Tensor:
        """The output of ``block`` for hidden states (rows, tokens, hidden_size) of ``batch``."""
        call = batch.calls[index]
        with running(self.skeleton.model, self.skeleton.directory):
            output = block(hidden, *call.args, **call.kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def advance(self, index: int, block: nn.Module, batches: list[Batch]) -> None:
        """Carry every batch through ``block``."""
        for batch in batches:
            batch.hidden = self.run(index, block, batch, batch.hidden)

    @contextmanager
    def head(self) -> Iterator[Callable[[Batch, slice], Tensor]]:
        """A function from (batch, slice of the vocabulary) to logits (rows, tokens, slice).

        A slice is exact because what models do to logits afterwards is elementwise.
        Raises InputError for a model without a linear output embedding.
        """
        output: Any = self.skeleton.model.get_output_embeddings()
        if not isinstance(output, nn.Linear):
            raise InputError(
                f"{type(self.skeleton.model).__name__} has no linear output embedding",
                where=str(self.skeleton.directory),
            )
        key = self.output_key
        held: dict[tuple[int, int], Tensor] = {}  # one slice at most

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

            return self._stubs.finish(batch.ids, batch.hidden, project)

        with self._parameters.loaded(self._parameters.outside_layers()):
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
                raise Stop

            with suppress(Stop):
                self._stubs.finish(batch.ids, hidden, project)
            return seen[0]

        with self._parameters.loaded(self._parameters.outside_layers()):
            yield read

    @contextmanager
    def whole(self) -> Iterator[PreTrainedModel]:
        """The model with all its weights in memory, for engines that must hold it.

        It raises InputError for ids that its embedding has no rows for, and so does the context
        where transformers can't run it.
        """
        embedding = self.skeleton.model.get_input_embeddings()
        check = embedding.register_forward_pre_hook(self._check_ids)
        try:
            with (
                self._parameters.loaded(self._parameters.in_text()),
                running(self.skeleton.model, self.skeleton.directory),
            ):
                yield self.skeleton.model
        finally:
            check.remove()

    def _check_ids(self, embedding: Any, args: tuple[Any, ...]) -> None:
        # torch's own error names neither the id nor the cause, and on a GPU it ends the process.
        rows, ids = embedding.weight.shape[0], args[0]
        if ids.numel() and (largest := int(ids.max())) >= rows:
            raise InputError(
                f"the text holds the token id {largest}, but the model's embedding has only {rows} "
                "rows",
                where=str(self.skeleton.directory),
                fix="Use the tokenizer that the model was trained with.",
            )

    @property
    def output_key(self) -> str:
        """The checkpoint's key of the output embedding's weight."""
        output = self.skeleton.model.get_output_embeddings()
        return self.skeleton.key(self._parameters.weight_of(output))

    @property
    def vocabulary(self) -> int:
        """Rows of the output embedding."""
        return int(self.skeleton.model.get_output_embeddings().weight.shape[0])


def slices(vocabulary: int, size: int = 2048) -> Iterator[slice]:
    """The vocabulary in slices whose logits fit in memory beside the hidden states."""
    for start in range(0, vocabulary, size):
        yield slice(start, min(start + size, vocabulary))
