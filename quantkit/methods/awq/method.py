"""AWQ: its settings in a recipe, and its search on the inputs of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from quantkit.calibration.needs import Needs
from quantkit.calibration.statistics import InputStatistics
from quantkit.methods.awq.search import InputGram, quantize_target, sample_losses, search_scale
from quantkit.methods.linears import BlockResult, Linears, QuantizedLinear, output_energy
from quantkit.methods.method import AffineMethod
from quantkit.methods.rescaling import Target, quantize_rescaled


class Awq(AffineMethod):
    """AWQ, arXiv 2306.00978: activation-aware scales and clipping."""

    tag = "awq"
    calibration = "required"
    rescales = True

    method: Literal["awq"]
    scale_steps: Annotated[int, Field(ge=1, le=100)] = 20
    clip_search: bool = True
    propagate: Literal["original", "quantized"] = "original"

    def needs(self) -> Needs:
        return Needs("gram", folds=True, propagate=self.propagate)

    def quantize(self, linears: Linears) -> BlockResult:
        return quantize_rescaled(linears, _AwqRescaler(self, linears))


class _AwqRescaler:
    """Searches the scales of inputs, and quantizes the linears that read them."""

    def __init__(self, method: Awq, linears: Linears) -> None:
        self._method, self._linears = method, linears
        self._held: tuple[InputStatistics, InputGram] | None = None

    def scale(
        self,
        inputs: Sequence[tuple[InputStatistics, Sequence[Target]]],
        realize: Callable[[Tensor], Tensor],
    ) -> Tensor | None:
        steps, clip = self._method.scale_steps, self._method.clip_search
        targets = [target for _, of in inputs for target in of]
        if len(inputs) == 1:
            gram = self._gram(inputs[0][0])
            return search_scale(targets, gram, realize, steps=steps, clip=clip)
        # One scale for all experts, from what all of them read: one matrix in place of hundreds.
        total = InputGram(sum_of_matrices(group for group, _ in inputs))
        scale = search_scale(targets, total, realize, steps=steps, clip=clip)
        if scale is None:
            return None
        # But each expert has tokens of its own, which may not gain by it.
        compared = [torch.ones_like(scale), scale]
        losses = [
            sample_losses(of, InputGram(group.moment.matrix()), compared, clip=clip)
            for group, of in inputs
        ]
        without, with_it = (sum(of) for of in zip(*losses, strict=True))
        return scale if with_it < without else None

    def quantize(
        self, name: str, group: InputStatistics, target: Target, scale: Tensor | None
    ) -> QuantizedLinear:
        clip = self._method.clip_search
        rounded = quantize_target(target, self._gram(group), scale, clip=clip)
        error = rounded.loss / output_energy(group, name)
        return QuantizedLinear(rounded.tensor, self._linears.report(name, error, "outputs"))

    def _gram(self, group: InputStatistics) -> InputGram:
        """The matrix of one input, kept until another is asked for."""
        if self._held is None or self._held[0] is not group:
            self._held = (group, InputGram(group.moment.matrix()))
        return self._held[1]


def sum_of_matrices(groups: Iterable[InputStatistics]) -> Tensor:
    """The Gram matrix of all tokens that the inputs have, (in, in)."""
    total: Tensor | None = None
    for group in groups:
        matrix = group.moment.matrix()
        total = matrix if total is None else total.add_(matrix)
    assert total is not None
    return total
