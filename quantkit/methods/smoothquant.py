"""SmoothQuant: what makes inputs hard to round is moved into the weights.

Xiao et al., arXiv 2211.10438. Where both a linear's inputs and its weights are rounded to 8 bits,
a few features that are much larger than the others cost all others their precision. Dividing
feature j of the input by

    s_j = a_j^α / w_j^(1 - α)

and multiplying column j of the weights by it leaves the product the same, and makes both easier to
round. a_j is the size of the feature, w_j the largest weight that reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from quantkit.calibration.needs import Needs
from quantkit.calibration.statistics import InputStatistics
from quantkit.methods import rtn
from quantkit.methods.grids import Grid, sum_of
from quantkit.methods.linears import BlockResult, Linears, QuantizedLinear
from quantkit.methods.method import LinearMethod
from quantkit.methods.rescaling import Target, centered, quantize_rescaled

_SMALLEST = 1e-6  # share of the largest, for features and weights that are zero


class SmoothQuant(LinearMethod):
    """SmoothQuant, arXiv 2211.10438: weights and inputs of linears in int8."""

    tag = "smoothquant"
    calibration = "required"
    rounds_inputs = True
    rescales = True

    method: Literal["smoothquant"]
    alpha: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.5, description="how much of the inputs' spread is moved into the weights"
    )
    format: Literal["compressed-tensors"] = "compressed-tensors"

    def needs(self) -> Needs:
        return Needs("diagonal", folds=True)

    def default_scheme(self) -> Grid:
        return Grid(8, -1, symmetric=True, rounds_inputs=True)

    def quantize(self, linears: Linears) -> BlockResult:
        return quantize_rescaled(linears, _Smoother(self, linears))


class _Smoother:
    """Smooths inputs, and rounds the linears that read them to the nearest codes."""

    def __init__(self, method: SmoothQuant, linears: Linears) -> None:
        self._method, self._linears = method, linears

    def scale(
        self,
        inputs: Sequence[tuple[InputStatistics, Sequence[Target]]],
        realize: Callable[[Tensor], Tensor],
    ) -> Tensor | None:
        weights = [target.weight for _, targets in inputs for target in targets]
        # The paper takes the largest |x_j| ever seen for a_j, because its scales are fixed for all
        # tokens. Here a token has a scale of its own, so a feature counts by how large it usually
        # is: its root mean square, which one extreme token (often the first of a text) can't
        # decide. docs/recipes.md compares the two.
        tokens = sum(group.tokens for group, _ in inputs)
        shares = [group.importance() * (group.tokens / tokens) for group, _ in inputs]
        sizes = torch.stack(shares).sum(0).sqrt()
        return realize(centered(smoothing_scale(sizes, weights, self._method.alpha)))

    def quantize(
        self, name: str, group: InputStatistics, target: Target, scale: Tensor | None
    ) -> QuantizedLinear:
        weight, importance = target.weight, group.importance()
        tensor = rtn.quantize(weight if scale is None else weight * scale, target.grid)
        value = tensor.dequantize() if scale is None else tensor.dequantize().div_(scale)
        errors, squares = value.sub_(weight).square_(), weight.square()
        plain, weighted = (
            sum_of((errors * counts).sum(1)) / max(sum_of((squares * counts).sum(1)), 1e-30)
            for counts in (torch.ones_like(importance), importance)
        )
        # The error is the weights' alone: what rounding the inputs costs depends on the largest
        # feature of each token, which the statistics don't tell.
        report = self._linears.report(name, plain, "weights")
        return QuantizedLinear(tensor, replace(report, weighted_error=weighted))


def smoothing_scale(activation: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """s (in,), by which inputs are divided.

    activation: the sizes a of the features, (in,); weights: all that read them, (out, in) float32;
    alpha: 0 balances the weights alone, 1 the inputs alone.
    """
    largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    return _positive(activation) ** alpha / _positive(largest) ** (1 - alpha)


def _positive(values: Tensor) -> Tensor:
    """``values`` (n,), at least 0, with a floor above zero."""
    return values.clamp(min=_SMALLEST * float(values.max().clamp(min=_SMALLEST)))
