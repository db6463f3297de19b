"""AWQ: rescale inputs so that the channels that matter round finely, then clip, then round.

Lin et al., arXiv 2306.00978. A scale s on a linear's input features turns Q(W) x into
Q(W·s) (x/s): columns with a large s keep more of their precision. The paper scales by mean |x|
and searches on the block's output. Here both searches minimise the Gram loss tr(ΔW G ΔWᵀ) of the
linears that read the input, which is their squared output error over the calibration tokens and
needs no further forward; the activation's size is the root of the Gram's diagonal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.quantizers import rtn
from quantkit.quantizers.grid import (
    Grid,
    QuantizedTensor,
    assemble,
    encode,
    gram_loss,
    grouped,
    search_range,
    total,
)

_SMALLEST_CLIP = 0.5
_CLIP_STEPS = 10


@dataclass(frozen=True)
class Target:
    """A linear that reads the input under search.

    weight: (out, in) float32; rows: how much a unit of each output counts, (out,), where the
    outputs have been rescaled already (they are the input of a later fold).
    """

    weight: Tensor
    grid: Grid
    rows: Tensor


@dataclass(frozen=True)
class Rounded:
    """Targets quantized at one input scale (None: 1): their tensors and their losses, in order."""

    scale: Tensor | None
    tensors: tuple[QuantizedTensor, ...]
    losses: tuple[float, ...]


def search_scale(
    targets: Sequence[Target],
    gram: Tensor,
    realise: Callable[[Tensor], Tensor] | None,
    *,
    steps: int,
    clip: bool,
) -> tuple[Rounded, Rounded]:
    """Quantize at the input scale (in_features) with the lowest Gram loss, and at scale 1.

    targets: every quantized linear that reads the input; gram: XᵀX (in, in); realise: turns a
    wished scale into the one that the producer can really undo (shared heads, norms rounded to
    their dtype), None where nothing can undo one; steps: exponents tried; clip: see ``quantize``.
    """
    plain = best = _at(targets, gram, None, clip)
    if realise is None:
        return plain, plain
    activation = gram.diagonal().clamp(min=1e-12).sqrt()
    size = torch.cat([_relative_size(t.weight, t.grid) for t in targets]).mean(0)
    size = size.clamp(min=1e-4)
    ratios = [step / steps for step in range(1, steps + 1)]
    for family in (
        [activation**ratio for ratio in ratios],
        [activation**ratio / size ** (1 - ratio) for ratio in ratios],
    ):
        # Clipping is dear and moves the optimum towards smaller scales, so the family's best
        # scale is found without it, and then it and milder forms of it are tried with it.
        leader = min(family, key=lambda wished: _loss(targets, gram, realise(_centred(wished))))
        for power in (1.0, 0.5, 0.25) if clip else (1.0,):
            found = _at(targets, gram, realise(_centred(leader**power)), clip)
            if sum(found.losses) < sum(best.losses):
                best = found
    return best, plain


def _centred(scale: Tensor) -> Tensor:
    """The scale with its extremes balanced around 1: only ratios between channels matter."""
    return (scale / (scale.max() * scale.min()).sqrt()).clamp(1e-4, 1e4)


def _loss(targets: Sequence[Target], gram: Tensor, scale: Tensor) -> float:
    """Loss of plain rounding at one scale."""
    return sum(_at(targets, gram, scale, clip=False).losses)


def _relative_size(weight: Tensor, grid: Grid) -> Tensor:
    """|w| as a share of the largest of its group: how much of the range each weight uses."""
    groups = grouped(weight.abs(), grid)
    return (groups / groups.amax(2, keepdim=True).clamp(min=1e-12)).flatten(1)


def _at(targets: Sequence[Target], gram: Tensor, scale: Tensor | None, clip: bool) -> Rounded:
    """Quantize the targets at one scale."""
    scaled_gram = gram if scale is None else gram / scale[:, None] / scale
    tensors, losses = [], []
    for target in targets:
        weight = target.weight if scale is None else target.weight * scale
        tensor = quantize(weight, scaled_gram, target.grid, clip=clip)
        difference = tensor.dequantize().sub_(weight)
        tensors.append(tensor)
        losses.append(total(gram_loss(difference, scaled_gram) * target.rows**2))
    return Rounded(scale, tuple(tensors), tuple(losses))


def quantize(weight: Tensor, gram: Tensor, grid: Grid, *, clip: bool) -> QuantizedTensor:
    """Quantize a (scaled) weight (out, in) under the Gram matrix of its (scaled) input.

    With ``clip`` the range of each (row, group) shrinks as far as that lowers the output error
    of the group by itself; a row keeps its full range where the whole row's error says otherwise.
    """
    nearest = rtn.quantize(weight, grid)
    if not clip:
        return nearest
    groups = grouped(weight, grid)  # (out, groups, columns)
    count, columns = groups.shape[1:]
    # The Gram's diagonal blocks (groups, columns, columns): what a group's error costs alone.
    blocks = gram.view(count, columns, count, columns).diagonal(dim1=0, dim2=2).permute(2, 0, 1)

    def cost(error: Tensor) -> Tensor:
        by_group = error.transpose(0, 1)  # (groups, out, columns)
        return (torch.bmm(by_group, blocks) * by_group).sum(2).t()

    scale, zero = search_range(groups, grid, cost, steps=_CLIP_STEPS, smallest=_SMALLEST_CLIP)
    codes = encode(groups, scale[..., None], zero[..., None], grid).flatten(1)
    clipped = assemble(codes, scale, zero, grid)
    wins = gram_loss(clipped.dequantize() - weight, gram) < gram_loss(
        nearest.dequantize() - weight, gram
    )
    return QuantizedTensor(
        grid,
        torch.where(wins[:, None], clipped.codes, nearest.codes),
        torch.where(wins[:, None], clipped.scales, nearest.scales),
        torch.where(wins[:, None], clipped.zeros, nearest.zeros),
    )
