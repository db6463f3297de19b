"""Proof that a merged checkpoint computes what base and adapters do at run time.

Three models are streamed over the same rows, block by block and in float32: the base with the
adapters applied to activations, y + scale · B(A x); the merged weights before they are rounded to
the checkpoint's dtype; and the merged weights as stored. The last two give what the rounding costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.base.errors import QuantkitError
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.weights import TensorSource
from quantkit.judging.likelihood import FinalStates, compare_predictions, final_states
from quantkit.lora.changes import Factors
from quantkit.lora.checkpoint import AdaptedCheckpoint
from quantkit.model.limits import Limits
from quantkit.model.skeleton import Skeleton
from quantkit.model.stream import Stream
from quantkit.results.manifest import MergeProof

LIMIT = 1e-4  # of MergeProof.difference
_ROWS, _TOKENS = 2, 64
PASSES = 3  # how often prove() calls step


def prove(
    adapted: AdaptedCheckpoint, merged: Checkpoint, step: Callable[[], None] = lambda: None
) -> MergeProof:
    """Compare ``merged``, a written checkpoint, with the base and adapters in ``adapted``.

    ``step`` is called ``PASSES`` times. Raises QuantkitError for a difference of over ``LIMIT``.
    """
    skeletons = [Skeleton(merged, torch.float32) for _ in range(PASSES)]
    rows = _inputs(skeletons[0], merged, adapted.trained_tokens())
    others = {
        adapted.key(f"{name}.weight")
        for name, module in skeletons[0].model.named_modules()
        if not _adds(module) and adapted.touches(f"{name}.weight")
    }
    sources: tuple[TensorSource, ...] = (
        _Source(
            adapted,
            lambda key: (adapted.read_float32 if key in others else adapted.read_unmerged)(key),
        ),
        _Source(adapted, adapted.read_float32),
        merged,
    )
    at_run_time, in_float32, stored = (
        Stream(skeleton, source, torch.device("cpu"))
        for skeleton, source in zip(skeletons, sources, strict=True)
    )
    with _applied(at_run_time.skeleton.model, adapted):
        expected = _logits(final_states(at_run_time, rows))
    step()
    exact = final_states(in_float32, rows)
    difference = _difference(expected, _logits(exact))
    step()
    kl = compare_predictions(exact, final_states(stored, rows)).kl.mean().item()
    step()
    if not difference <= LIMIT:
        raise QuantkitError(
            f"the merged model's logits differ from those of base and adapter by {difference:.2e}, "
            f"more than {LIMIT:.0e}; nothing was written",
            where=", ".join(adapter.name for adapter in adapted.adapters),
            fix="Please report it with the adapter's config. --no-proof skips the comparison.",
        )
    count, length = rows.shape
    return MergeProof(difference, kl, rows=count, tokens=length, limit=LIMIT)


@dataclass(frozen=True)
class _Source:
    """The tensors of ``adapted``, read by its method ``read``. Implements ``TensorSource``."""

    adapted: AdaptedCheckpoint
    read: Callable[[str], Tensor]

    def keys(self) -> list[str]:
        return list(self.adapted.keys())

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        return self.read(key)[start:stop]


def _inputs(skeleton: Skeleton, merged: Checkpoint, tokens: list[int]) -> Tensor:
    """Random but fixed token ids (rows, tokens), with the last of the vocabulary and ``tokens``."""
    limits = Limits.of(skeleton, merged)
    vocabulary = limits.vocabulary
    shape = (_ROWS, min(_TOKENS, limits.positions or _TOKENS))
    ids = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))
    ids[0, -1] = vocabulary - 1
    special = torch.tensor(tokens[: shape[1]], dtype=ids.dtype)
    ids[1, : len(special)] = special
    return ids


def _logits(finished: FinalStates) -> list[Tensor]:
    """Logits (rows, tokens, vocabulary) of every batch."""
    # Not in slices of the vocabulary: an adapter on the output embedding adds to all of it at once.
    with finished.stream.head() as logits:
        return [logits(batch, slice(0, finished.stream.vocabulary)) for batch in finished.batches]


def _difference(expected: list[Tensor], merged: list[Tensor]) -> float:
    worst = [
        ((one - other).double().norm(dim=-1) / one.double().norm(dim=-1)).max()
        for one, other in zip(expected, merged, strict=True)
    ]
    return torch.stack(worst).max().item()


@contextmanager
def _applied(model: nn.Module, adapted: AdaptedCheckpoint) -> Iterator[None]:
    """``model`` with hooks that add the adapters' part to the output of each module they change."""
    handles = []
    for name, module in model.named_modules():
        weight, bias = f"{name}.weight", f"{name}.bias"
        if _adds(module) and adapted.touches(weight):
            # The module's own weight may be a part of it, or none: both ends are read in slices.
            stored = partial(adapted.read_unmerged, adapted.key(weight))
            hook = partial(_add, partial(adapted.factors, weight), stored)
            handles.append(module.register_forward_hook(hook))
        if "bias" in module._parameters and adapted.touches(bias):
            hook = partial(_shift, partial(adapted.added, bias))
            handles.append(module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adds(module: nn.Module) -> bool:
    """Whether what adapters add to a module's weight can be added to its output.

    A router gives more than its product with the weight; its weight is merged for both sides.
    """
    from transformers.pytorch_utils import Conv1D

    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return plain or isinstance(module, nn.Embedding | Conv1D)


def _shift(
    added: Callable[[], Tensor | None], module: nn.Module, inputs: tuple[Any, ...], output: Tensor
) -> Tensor:
    bias = added()
    return output if bias is None else output + bias


def _add(
    read: Callable[[], Factors | None],
    read_weight: Callable[[], Tensor],
    module: nn.Module,
    inputs: tuple[Any, ...],
    output: Tensor,
) -> Tensor:
    """The output of ``module`` with its adapters, from its ``inputs`` and ``output`` without.

    read, read_weight: give what the adapters add, and the weight that they add it to.
    """
    factors = read()
    if factors is None:
        return output
    bias = getattr(module, "bias", None)
    if isinstance(module, nn.Embedding):
        update = nn.functional.embedding(inputs[0], factors.a.T) @ factors.b.T
        # Some embeddings, as Gemma 3's, multiply what they look up.
        update = update * getattr(module, "embed_scale", 1.0)
    elif isinstance(module, nn.Linear) and factors.transposed:  # tied to an embedding
        update = inputs[0] @ factors.b @ factors.a
    else:
        update = inputs[0] @ factors.a.T @ factors.b.T
    update = update * factors.scale
    if factors.magnitude is None:
        return output + update
    weight = read_weight()
    stored = weight.T if factors.transposed else weight
    lengths = (stored + factors.scale * factors.b @ factors.a).norm(dim=1)
    shift = torch.zeros(()) if bias is None else bias
    return (output - shift + update) * (factors.magnitude / lengths) + shift
