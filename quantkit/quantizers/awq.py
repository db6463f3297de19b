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

from quantkit.parallel import multiplies_bfloat16, spread
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
_SAMPLE = 128  # rows that scales are compared on, over all readers of an input
_SLAB = 1024  # rows whose losses are taken together: fixed, so that bytes never vary


@dataclass(frozen=True)
class Target:
    """A linear that reads the input under search.

    weight: (out, in) float32; rows: how much a unit of each output counts, (out,), where the
    outputs have been rescaled already (they are the input of a later fold).
    """

    weight: Tensor
    grid: Grid
    rows: Tensor


class Inputs:
    """What the targets read: ``gram``, XᵀX (in, in) float32, and a ``rough`` copy of it with
    which losses are compared. Such long sums lose nothing that matters in bfloat16."""

    def __init__(self, gram: Tensor) -> None:
        self.gram = gram
        self.rough = gram.bfloat16() if multiplies_bfloat16(gram.device) else gram


@dataclass(frozen=True)
class Rounded:
    """A target quantized: its tensor, and its loss with each row counted as it should."""

    tensor: QuantizedTensor
    loss: float


def search_scale(
    targets: Sequence[Target],
    inputs: Inputs,
    realise: Callable[[Tensor], Tensor],
    *,
    steps: int,
    clip: bool,
) -> Tensor | None:
    """The input scale (in_features,) with the lowest Gram loss; None where 1 has.

    targets: every quantized linear that reads the input; realise: turns a wished scale into the
    one that the producer can really undo (shared heads, norms rounded to their dtype); steps:
    exponents tried; clip: see ``quantize``.
    """
    sample = _sample(targets)
    activation = inputs.gram.diagonal().clamp(min=1e-12).sqrt()
    size = torch.cat([_relative_size(t.weight, t.grid) for t in targets]).mean(0)
    size = size.clamp(min=1e-4)
    ratios = [step / steps for step in range(1, steps + 1)]

    def losses(wished: Sequence[Tensor], clip: bool) -> list[float]:
        def loss(scale: Tensor) -> float:
            return sum(quantize(t, inputs, realise(centred(scale)), clip=clip).loss for t in sample)

        return spread(loss, wished, activation.device)

    finalists = [torch.ones_like(activation)]
    for family in (
        [activation**ratio for ratio in ratios],
        [activation**ratio / size ** (1 - ratio) for ratio in ratios],
    ):
        # Clipping is dear and moves the optimum towards smaller scales, so the family's best
        # scale is found without it, and then it and milder forms of it are tried with it.
        leader = _lowest(family, lambda some: losses(some, False))
        finalists += [leader**power for power in ((1.0, 0.5, 0.25) if clip else (1.0,))]
    found = losses(finalists, clip)
    best = found.index(min(found))
    return realise(centred(finalists[best])) if best else None


def quantize(target: Target, inputs: Inputs, scale: Tensor | None = None, *, clip: bool) -> Rounded:
    """Quantize a target's weight times ``scale`` under the Gram matrix of its input.

    With ``clip`` the range of each (row, group) shrinks as far as that lowers the output error
    of the group by itself; a row keeps its full range where the whole row's error says otherwise.
    """
    weight, grid = target.weight, target.grid
    if scale is not None:
        weight = weight * scale
    nearest = rtn.quantize(weight, grid)
    losses = _row_losses(nearest, weight, inputs, scale)
    if not clip:
        return Rounded(nearest, total(losses * target.rows**2))
    # The Gram's diagonal blocks (groups, columns, columns): what a group's error costs alone.
    columns = grid.columns(weight.shape[1])
    shape = (-1, columns, weight.shape[1] // columns, columns)
    blocks = inputs.gram.view(shape).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    if scale is not None:
        inverse = (1 / scale).view(-1, columns)
        blocks = blocks * inverse[:, :, None] * inverse[:, None, :]
    rough = blocks.to(inputs.rough.dtype).contiguous()

    def cost(error: Tensor) -> Tensor:
        by_group = error.transpose(0, 1)  # (groups, rows, columns)
        through_gram = torch.bmm(by_group.to(rough.dtype), rough).float()
        return torch.linalg.vecdot(through_gram, by_group).t()

    ranges = search_range(weight, grid, cost, steps=_CLIP_STEPS, smallest=_SMALLEST_CLIP)
    clipped = _at(weight, grid, *ranges)
    clipped_losses = _row_losses(clipped, weight, inputs, scale)
    wins = (clipped_losses < losses)[:, None]
    tensor = QuantizedTensor(
        grid,
        torch.where(wins, clipped.codes, nearest.codes),
        torch.where(wins, clipped.scales, nearest.scales),
        torch.where(wins, clipped.zeros, nearest.zeros),
    )
    return Rounded(tensor, total(torch.minimum(losses, clipped_losses) * target.rows**2))


def _sample(targets: Sequence[Target]) -> list[Target]:
    """The targets with evenly spaced rows of each."""
    rows = sum(len(target.weight) for target in targets)
    step = max(1, rows // _SAMPLE)
    return [Target(t.weight[::step].contiguous(), t.grid, t.rows[::step]) for t in targets]


def _lowest(family: Sequence[Tensor], losses: Callable[[Sequence[Tensor]], list[float]]) -> Tensor:
    """The member with the lowest loss: coarsely first, then between the best one's neighbours."""
    known: dict[int, float] = {}
    stride = 4
    places = list(range(stride - 1, len(family), stride)) or list(range(len(family)))
    while True:
        known |= dict(zip(places, losses([family[place] for place in places]), strict=True))
        best = min(known, key=lambda place: (known[place], place))
        stride //= 2
        if not stride:
            return family[best]
        near = (best - stride, best + stride)
        places = [p for p in near if 0 <= p < len(family) and p not in known]


def centred(scale: Tensor) -> Tensor:
    """The scale with its extremes balanced around 1: only ratios between channels matter."""
    return (scale / (scale.max() * scale.min()).sqrt()).clamp(1e-4, 1e4)


def _relative_size(weight: Tensor, grid: Grid) -> Tensor:
    """|w| as a share of the largest of its group: how much of the range each weight uses."""
    groups = grouped(weight.abs(), grid)
    return (groups / groups.amax(2, keepdim=True).clamp(min=1e-12)).flatten(1)


def _at(weight: Tensor, grid: Grid, scale: Tensor, zero: Tensor) -> QuantizedTensor:
    codes = encode(grouped(weight, grid), scale[..., None], zero[..., None], grid)
    return assemble(codes.flatten(1), scale, zero, grid)


def _row_losses(
    tensor: QuantizedTensor, weight: Tensor, inputs: Inputs, scale: Tensor | None
) -> Tensor:
    """Gram loss of each row, (out,): weight and tensor are scaled, the inputs aren't."""
    difference = tensor.dequantize().sub_(weight)
    if scale is not None:
        difference /= scale
    return torch.cat([gram_loss(part, inputs.rough) for part in difference.split(_SLAB)])
