"""AWQ's arithmetic: the search for an input's scale, and for the ranges of the weights' groups.

Lin et al., arXiv 2306.00978. With a scale s on a linear's input features, Q(W) x becomes
Q(W·s) (x/s): columns with a large s keep more of their precision. The paper scales by mean |x| and
searches on the block's output. Here the size of a feature is the root of the Gram matrix's
diagonal, and both searches minimize tr(ΔW G ΔWᵀ), the squared output error over the calibration
tokens of the linears that read the input, which needs no further forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.base.parallel import multiplies_bfloat16, parallel_map
from quantkit.methods import rtn
from quantkit.methods.grids import (
    Grid,
    QuantizedTensor,
    grouped,
    nearest_codes,
    search_range,
    sum_of,
    weights_at_once,
)
from quantkit.methods.rescaling import Target, centered

_SMALLEST_CLIP = 0.5  # share of a group's range
_CLIP_STEPS = 10
# Rows that scales are compared on, over all linears that read an input. A sample is enough, since
# all rows of a weight see the same inputs. Half as many rows are as good on one model, and rescale
# too few inputs on another (docs/quality.md).
_SAMPLE = 128
_PANEL = 512  # columns of the Gram matrix multiplied together


class InputGram:
    """The Gram matrix of one input, and the losses of quantized weights that read it.

    gram: XᵀX (in, in) float32; dtype: that of the products from which losses are computed.
    """

    def __init__(self, gram: Tensor) -> None:
        self.gram = gram
        # Losses are compared with each other: for such long sums bfloat16 is exact enough.
        self.dtype = torch.bfloat16 if multiplies_bfloat16(gram.device) else gram.dtype
        # x G xᵀ = x L xᵀ, with L the lower triangle of G, doubled but for the diagonal. That takes
        # half of the products, and doubling is exact.
        self._triangle = gram.to(self.dtype, copy=True).tril_().mul_(2)
        self._triangle.diagonal().mul_(0.5)

    def losses(self, error: Tensor) -> Tensor:
        """Squared output error of each row, (out,), for the error (out, in) of a weight."""
        rough = error.to(self.dtype)
        # A panel of columns at a time skips the zeros above most of the diagonal.
        losses = torch.zeros(len(error), device=error.device)
        for first in range(0, error.shape[1], _PANEL):
            columns = slice(first, first + _PANEL)
            product = rough[:, first:] @ self._triangle[first:, columns]
            losses += torch.linalg.vecdot(product.float(), error[:, columns])
        return losses


@dataclass(frozen=True)
class RoundedTarget:
    """A quantized target, and its loss tr(ΔW G ΔWᵀ) with errors multiplied by ``Target.rows``."""

    tensor: QuantizedTensor
    loss: float


def search_scale(
    targets: Sequence[Target],
    inputs: InputGram,
    realize: Callable[[Tensor], Tensor],
    *,
    steps: int,
    clip: bool,
) -> Tensor | None:
    """The input's scale (in,) with the lowest loss; None where no scale has a lower one.

    targets: every linear to be quantized that reads the input; realize: turns a scale (in,) into
    the nearest one that can be undone exactly; steps: the number of exponents tried; clip: see
    ``quantize_target``.
    """
    sample = _sample(targets)
    activation = inputs.gram.diagonal().clamp(min=1e-12).sqrt()
    size = torch.cat([_relative_size(t.weight, t.grid) for t in targets]).mean(0)
    size = size.clamp(min=1e-4)
    # The paper's scales a^r, and scales that also are larger where weights use little of their
    # group's range: a^r / w^(1 - r).
    ratios = [step / steps for step in range(1, steps + 1)]

    def losses(candidates: Sequence[Tensor], clip: bool) -> list[float]:
        def losses_of(batch: Sequence[Tensor]) -> list[float]:
            scales = [realize(centered(scale)) for scale in batch]
            return _sample_losses(sample, inputs, scales, clip)

        # Several scales are tried in one call: small calls cost more than their arithmetic.
        room = weights_at_once(activation.device)
        count = max(1, room // sum(target.weight.numel() for target in sample))
        batches = [candidates[first : first + count] for first in range(0, len(candidates), count)]
        parts = parallel_map(losses_of, batches, activation.device)
        return [loss for part in parts for loss in part]

    # Clipping takes time, and moves the optimum towards smaller scales. So the best scale of each
    # family is searched without it; its powers are then compared with clipping.
    families = [
        [activation**ratio for ratio in ratios],
        [activation**ratio / size ** (1 - ratio) for ratio in ratios],
    ]
    finalists = [torch.ones_like(activation)]
    for leader in _best_of_each(families, lambda members: losses(members, False)):
        finalists += [leader**power for power in ((1.0, 0.5, 0.25) if clip else (1.0,))]
    # The first finalist is no scale at all, which wins a tie.
    final = losses(finalists, clip)
    best = final.index(min(final))
    return realize(centered(finalists[best])) if best else None


def sample_losses(
    targets: Sequence[Target], inputs: InputGram, scales: Sequence[Tensor], *, clip: bool
) -> list[float]:
    """The loss with each of the scales (in,), on some rows of the targets."""
    return _sample_losses(_sample(targets), inputs, scales, clip)


def quantize_target(
    target: Target, inputs: InputGram, scale: Tensor | None = None, *, clip: bool
) -> RoundedTarget:
    """Quantize a target's weight times ``scale`` (in,), under the Gram matrix of its input.

    clip: whether the range of each (row, group) shrinks as far as that lowers the output error of
    the group by itself. A row whose whole output error grows by that keeps its full ranges.
    """
    rows = max(1, weights_at_once(target.weight.device) // target.weight.shape[1])
    pieces = [
        Target(weight, target.grid, counts)
        for weight, counts in zip(target.weight.split(rows), target.rows.split(rows), strict=True)
    ]

    def quantized(piece: Target) -> tuple[QuantizedTensor, Tensor]:
        return _quantize_piece(piece, inputs, scale, clip)

    tensors, losses = zip(*parallel_map(quantized, pieces, target.weight.device), strict=True)
    tensor = QuantizedTensor(
        target.grid,
        torch.cat([tensor.codes for tensor in tensors]),
        torch.cat([tensor.scales for tensor in tensors]),
        torch.cat([tensor.zeros for tensor in tensors]),
    )
    return RoundedTarget(tensor, sum_of(torch.cat(losses)))


def _sample_losses(
    sample: Sequence[Target], inputs: InputGram, scales: Sequence[Tensor], clip: bool
) -> list[float]:
    """The loss of ``sample`` with each of the scales (in,)."""
    losses = [0.0] * len(scales)
    for target in sample:
        count = len(target.weight)
        scale = scales[0]
        # The sample is repeated for each scale, as more rows of one weight.
        if len(scales) > 1:
            scale = torch.stack(list(scales)).repeat_interleave(count, 0)
            weight = target.weight.repeat(len(scales), 1)
            target = Target(weight, target.grid, target.rows.repeat(len(scales)))
        per_scale = _quantize_piece(target, inputs, scale, clip)[1].split(count)
        losses = [loss + sum_of(rows) for loss, rows in zip(losses, per_scale, strict=True)]
    return losses


def _quantize_piece(
    target: Target, inputs: InputGram, scale: Tensor | None, clip: bool
) -> tuple[QuantizedTensor, Tensor]:
    """Quantize a target of at most ``weights_at_once`` weights; the loss of each row, (out,).

    scale: (in,), or (out, in) for another scale in each row.
    """
    weight, grid = target.weight, target.grid
    inverse = None
    if scale is not None:
        weight, inverse = weight * scale, 1 / scale
    counts = target.rows**2  # losses are squared errors
    nearest = rtn.quantize(weight, grid)
    losses = _row_losses(nearest, weight, inputs, inverse)
    if not clip:
        return nearest, losses * counts
    # The diagonal blocks of the Gram matrix, (groups, columns, columns), give what the error of a
    # group costs by itself.
    columns = grid.columns(weight.shape[1])
    shape = (-1, columns, weight.shape[1] // columns, columns)
    blocks = inputs.gram.view(shape).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    blocks = blocks.to(inputs.dtype).contiguous()
    by_group = None if inverse is None else grouped(inverse, grid)

    def cost(error: Tensor) -> Tensor:
        # Of the scaled weight: divided by the scale it is that of the weight itself.
        if by_group is not None:
            error.mul_(by_group)
        swapped = error.transpose(0, 1)  # (groups, rows, columns)
        through_gram = torch.bmm(swapped.to(blocks.dtype), blocks).float()
        return torch.linalg.vecdot(through_gram, swapped).t()

    ranges = search_range(weight, grid, cost, steps=_CLIP_STEPS, smallest=_SMALLEST_CLIP)
    clipped = _round_to(weight, grid, *ranges)
    clipped_losses = _row_losses(clipped, weight, inputs, inverse)
    # Groups shrink each by itself, but their errors add up: a row may end worse than before.
    wins = (clipped_losses < losses)[:, None]
    tensor = QuantizedTensor(
        grid,
        torch.where(wins, clipped.codes, nearest.codes),
        torch.where(wins, clipped.scales, nearest.scales),
        torch.where(wins, clipped.zeros, nearest.zeros),
    )
    return tensor, torch.minimum(losses, clipped_losses) * counts


def _sample(targets: Sequence[Target]) -> list[Target]:
    """Evenly spaced rows of all targets; those with the same grid become one target."""
    rows = sum(len(target.weight) for target in targets)
    step = max(1, rows // _SAMPLE)
    by_grid: dict[Grid, list[Target]] = {}
    for target in targets:
        by_grid.setdefault(target.grid, []).append(target)
    return [
        Target(
            torch.cat([target.weight[::step] for target in members]),
            grid,
            torch.cat([target.rows[::step] for target in members]),
        )
        for grid, members in by_grid.items()
    ]


def _best_of_each(
    families: Sequence[Sequence[Tensor]], losses: Callable[[Sequence[Tensor]], list[float]]
) -> list[Tensor]:
    """The member with the lowest loss of each family; all families are of one length.

    losses: a function from some members to their losses.
    """
    # Every fourth member first, then those between the best and its neighbors: that finds the
    # lowest loss wherever there is a single valley along the family. The members of all families
    # are tried in one call, so that all cores have work.
    length, stride = len(families[0]), 4
    known: list[dict[int, float]] = [{} for _ in families]  # losses by place in the family
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
    """|w| as a share of the largest in its group, (out, in)."""
    groups = grouped(weight.abs(), grid)
    return (groups / groups.amax(2, keepdim=True).clamp(min=1e-12)).flatten(1)


def _round_to(weight: Tensor, grid: Grid, scale: Tensor, zero: Tensor) -> QuantizedTensor:
    """``weight`` (out, in) as the nearest codes for these scales and zero points (out, groups)."""
    codes = nearest_codes(grouped(weight, grid), scale[..., None], zero[..., None], grid)
    return QuantizedTensor.of_floats(grid, codes.flatten(1), scale, zero)


def _row_losses(
    tensor: QuantizedTensor, weight: Tensor, inputs: InputGram, inverse: Tensor | None
) -> Tensor:
    """The loss of each row, (out,), where ``tensor`` rounds the scaled ``weight`` (out, in).

    inverse: 1 / scale, (in,) or (out, in); None without a scale.
    """
    difference = tensor.dequantize().sub_(weight)
    return inputs.losses(difference if inverse is None else difference.mul_(inverse))
