"""AWQ: rescale inputs so that the channels that matter round finely, then clip, then round.

Lin et al., arXiv 2306.00978. A scale s on a linear's input features turns Q(W) x into
Q(W·s) (x/s): columns with a large s keep more of their precision. The paper scales by mean |x|
and searches on the block's output. Here both searches minimise the Gram loss tr(ΔW G ΔWᵀ) of the
linears that read the input, which is their squared output error over the calibration tokens and
needs no further forward; the activation's size is the root of the Gram's diagonal. Scales are
compared on a sample of the rows: all rows of a matrix see the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.base.parallel import multiplies_bfloat16, parallel_map
from quantkit.methods import rtn
from quantkit.methods.grids import (
    AT_ONCE,
    Grid,
    QuantizedTensor,
    assemble,
    encode,
    grouped,
    search_range,
    total,
)
from quantkit.methods.rescaling import Target, centered

_SMALLEST_CLIP = 0.5
_CLIP_STEPS = 10
_SAMPLE = 128  # rows that scales are compared on, over all readers of an input
_PANEL = 512  # columns of the Gram matrix multiplied together


class Inputs:
    """What the targets read: ``gram``, XᵀX (in, in) float32, and how losses follow from it."""

    def __init__(self, gram: Tensor) -> None:
        self.gram = gram
        # Losses are compared, not reported: bfloat16 is exact enough for such long sums.
        self.dtype = torch.bfloat16 if multiplies_bfloat16(gram.device) else gram.dtype
        # x G xᵀ = x L xᵀ with L the lower triangle, all of it but the diagonal doubled: exact, for
        # 2 is a power of two, and half the products.
        self._folded = gram.to(self.dtype, copy=True).tril_().mul_(2)
        self._folded.diagonal().mul_(0.5)

    def losses(self, error: Tensor) -> Tensor:
        """Squared output error of each row, (out,), for an error (out, in) of the weights."""
        rough = error.to(self.dtype)
        losses = torch.zeros(len(error), device=error.device)
        for first in range(0, error.shape[1], _PANEL):
            columns = slice(first, first + _PANEL)
            product = rough[:, first:] @ self._folded[first:, columns]
            losses += torch.linalg.vecdot(product.float(), error[:, columns])
        return losses


@dataclass(frozen=True)
class Rounded:
    """A quantized target and its Gram loss, rows weighted by ``Target.rows``."""

    tensor: QuantizedTensor
    loss: float


def search_scale(
    targets: Sequence[Target],
    inputs: Inputs,
    realize: Callable[[Tensor], Tensor],
    *,
    steps: int,
    clip: bool,
) -> Tensor | None:
    """The input scale (in_features,) with the lowest Gram loss; None where that is 1.

    targets: every quantized linear that reads the input; realize: turns a scale into the one that
    the producer can really undo (shared heads, norms rounded to their dtype); steps: the number of
    exponents tried; clip: see ``quantize``.
    """
    sample = _sample(targets)
    activation = inputs.gram.diagonal().clamp(min=1e-12).sqrt()
    size = torch.cat([_relative_size(t.weight, t.grid) for t in targets]).mean(0)
    size = size.clamp(min=1e-4)
    ratios = [step / steps for step in range(1, steps + 1)]

    def losses(candidates: Sequence[Tensor], clip: bool) -> list[float]:
        def compare(some: Sequence[Tensor]) -> list[float]:
            scales = [realize(centered(scale)) for scale in some]
            return _compare(sample, inputs, scales, clip)

        # As many scales at once as fill a piece: small calls cost more than their arithmetic.
        count = max(1, AT_ONCE // sum(target.weight.numel() for target in sample))
        batches = [candidates[first : first + count] for first in range(0, len(candidates), count)]
        return [loss for part in parallel_map(compare, batches, activation.device) for loss in part]

    # Clipping costs time and moves the optimum towards smaller scales, so the best scale of each
    # family is searched without it; that one and milder forms of it are then tried with it.
    families = [
        [activation**ratio for ratio in ratios],
        [activation**ratio / size ** (1 - ratio) for ratio in ratios],
    ]
    finalists = [torch.ones_like(activation)]
    for leader in _lowest(families, lambda some: losses(some, False)):
        finalists += [leader**power for power in ((1.0, 0.5, 0.25) if clip else (1.0,))]
    final = losses(finalists, clip)
    best = final.index(min(final))
    return realize(centered(finalists[best])) if best else None


def quantize(target: Target, inputs: Inputs, scale: Tensor | None = None, *, clip: bool) -> Rounded:
    """Quantize a target's weight times ``scale`` under the Gram matrix of its input.

    With ``clip`` the range of each (row, group) shrinks as far as that lowers the output error
    of the group by itself; a row whose whole output error grows by that keeps its full ranges.
    """
    rows = max(1, AT_ONCE // target.weight.shape[1])
    pieces = [
        Target(weight, target.grid, counts)
        for weight, counts in zip(target.weight.split(rows), target.rows.split(rows), strict=True)
    ]

    def quantized(piece: Target) -> tuple[QuantizedTensor, Tensor]:
        return _quantize(piece, inputs, scale, clip)

    tensors, losses = zip(*parallel_map(quantized, pieces, target.weight.device), strict=True)
    tensor = QuantizedTensor(
        target.grid,
        torch.cat([tensor.codes for tensor in tensors]),
        torch.cat([tensor.scales for tensor in tensors]),
        torch.cat([tensor.zeros for tensor in tensors]),
    )
    return Rounded(tensor, total(torch.cat(losses)))


def _compare(
    sample: Sequence[Target], inputs: Inputs, scales: Sequence[Tensor], clip: bool
) -> list[float]:
    """The loss of the sample with each of the scales (in,)."""
    losses = [0.0] * len(scales)
    for target in sample:
        count = len(target.weight)
        scale = scales[0]
        if len(scales) > 1:
            scale = torch.stack(list(scales)).repeat_interleave(count, 0)
            weight = target.weight.repeat(len(scales), 1)
            target = Target(weight, target.grid, target.rows.repeat(len(scales)))
        rows = _quantize(target, inputs, scale, clip)[1].split(count)
        losses = [loss + total(row) for loss, row in zip(losses, rows, strict=True)]
    return losses


def _quantize(
    target: Target, inputs: Inputs, scale: Tensor | None, clip: bool
) -> tuple[QuantizedTensor, Tensor]:
    """``quantize`` for a few rows; the loss of each, (out,).

    A scale of their own for each row, (out, in), is for pieces of at most AT_ONCE weights.
    """
    weight, grid = target.weight, target.grid
    inverse = None
    if scale is not None:
        weight, inverse = weight * scale, 1 / scale
    counts = target.rows**2
    nearest = rtn.quantize(weight, grid)
    losses = _row_losses(nearest, weight, inputs, inverse)
    if not clip:
        return nearest, losses * counts
    # The Gram's diagonal blocks (groups, columns, columns): what a group's error costs alone.
    columns = grid.columns(weight.shape[1])
    shape = (-1, columns, weight.shape[1] // columns, columns)
    blocks = inputs.gram.view(shape).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    blocks = blocks.to(inputs.dtype).contiguous()
    by_group = None if inverse is None else grouped(inverse, grid)

    def cost(error: Tensor) -> Tensor:
        if by_group is not None:
            error.mul_(by_group)
        swapped = error.transpose(0, 1)  # (groups, rows, columns)
        through_gram = torch.bmm(swapped.to(blocks.dtype), blocks).float()
        return torch.linalg.vecdot(through_gram, swapped).t()

    ranges = search_range(weight, grid, cost, steps=_CLIP_STEPS, smallest=_SMALLEST_CLIP)
    clipped = _at(weight, grid, *ranges)
    clipped_losses = _row_losses(clipped, weight, inputs, inverse)
    wins = (clipped_losses < losses)[:, None]
    tensor = QuantizedTensor(
        grid,
        torch.where(wins, clipped.codes, nearest.codes),
        torch.where(wins, clipped.scales, nearest.scales),
        torch.where(wins, clipped.zeros, nearest.zeros),
    )
    return tensor, torch.minimum(losses, clipped_losses) * counts


def _sample(targets: Sequence[Target]) -> list[Target]:
    """Evenly spaced rows of the targets, those with one grid together."""
    rows = sum(len(target.weight) for target in targets)
    step = max(1, rows // _SAMPLE)
    by_grid: dict[Grid, list[Target]] = {}
    for target in targets:
        by_grid.setdefault(target.grid, []).append(target)
    return [
        Target(
            torch.cat([target.weight[::step] for target in some]),
            grid,
            torch.cat([target.rows[::step] for target in some]),
        )
        for grid, some in by_grid.items()
    ]


def _lowest(
    families: Sequence[Sequence[Tensor]], losses: Callable[[Sequence[Tensor]], list[float]]
) -> list[Tensor]:
    """Each family's member with the lowest loss. The families are of one length.

    Every fourth member is tried first, then those between the best and its neighbors, which finds
    the lowest wherever the loss has a single valley along the family.
    """
    length, stride = len(families[0]), 4
    known: list[dict[int, float]] = [{} for _ in families]
    first = range(stride - 1, length, stride) or range(length)
    places = [(family, place) for family in range(len(families)) for place in first]
    while True:
        tried = losses([families[family][place] for family, place in places])
        for (family, place), loss in zip(places, tried, strict=True):
            known[family][place] = loss
        best = [min(of, key=lambda place: (of[place], place)) for of in known]
        stride //= 2
        if not stride:
            return [family[place] for family, place in zip(families, best, strict=True)]
        places = [
            (family, place)
            for family, center in enumerate(best)
            for place in (center - stride, center + stride)
            if 0 <= place < length and place not in known[family]
        ]


def _relative_size(weight: Tensor, grid: Grid) -> Tensor:
    """|w| as a share of the largest of its group: how much of the range each weight uses."""
    groups = grouped(weight.abs(), grid)
    return (groups / groups.amax(2, keepdim=True).clamp(min=1e-12)).flatten(1)


def _at(weight: Tensor, grid: Grid, scale: Tensor, zero: Tensor) -> QuantizedTensor:
    codes = encode(grouped(weight, grid), scale[..., None], zero[..., None], grid)
    return assemble(codes.flatten(1), scale, zero, grid)


def _row_losses(
    tensor: QuantizedTensor, weight: Tensor, inputs: Inputs, inverse: Tensor | None
) -> Tensor:
    """Loss of each row, (out,): weight and tensor are scaled, the inputs aren't."""
    difference = tensor.dequantize().sub_(weight)
    return inputs.losses(difference if inverse is None else difference.mul_(inverse))
