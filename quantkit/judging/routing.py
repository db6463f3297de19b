"""Which experts each token of the judged rows is sent to, and where two models choose others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor

from quantkit.model.experts import Experts

Notes = list[list[Tensor]]  # what one mixture after the other chose, batch after batch


@contextmanager
def noted(experts: Mapping[str, Experts]) -> Iterator[Notes]:
    """What the mixtures of one layer choose while its rows pass, on the CPU."""
    notes: Notes = [[] for _ in experts]

    def note(own: list[Tensor], chosen: Tensor) -> None:
        own.append(chosen.cpu())

    with ExitStack() as stack:
        for mixture, own in zip(experts.values(), notes, strict=True):
            stack.enter_context(mixture.noted(partial(note, own)))
        yield notes


def choices(notes: Notes, rows: Tensor) -> Tensor | None:
    """The numbers of the experts of each token, (rows, tokens, chosen) int16; -1 for none.

    rows: (rows, tokens), all that passed. None where a mixture saw other tokens than these.
    """
    parts = []
    for own in notes:
        most = max((part.shape[1] for part in own), default=0)
        part = torch.cat([_wider(part, most) for part in own]) if own else torch.empty(0, 0)
        if len(part) != rows.numel():
            return None
        parts.append(part.view(*rows.shape, most))
    return torch.cat(parts, -1) if parts else None


def changed(baseline: Mapping[int, Tensor], variant: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """By layer, whether each token has other experts than in the baseline, (rows, tokens) bool.

    baseline, variant: ``choices`` by layer. Empty unless both have the same layers.
    """
    if baseline.keys() != variant.keys():
        return {}
    result = {}
    for layer, before in baseline.items():
        most = max(before.shape[-1], variant[layer].shape[-1])
        result[layer] = (_wider(before, most) != _wider(variant[layer], most)).any(-1)
    return result


def _wider(chosen: Tensor, most: int) -> Tensor:
    """``chosen`` (..., numbers) with so many numbers of each token."""
    return torch.nn.functional.pad(chosen, (0, most - chosen.shape[-1]), value=-1)
