"""AWQ: its settings in a recipe, and its search on the inputs of a block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from quantkit.calibration.needs import Needs
from quantkit.calibration.statistics import InputStatistics
from quantkit.methods.awq.search import InputGram, quantize_target, search_scale
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
        return quantize_rescaled(linears, lambda group: _AwqRescaler(self, linears, group))


class _AwqRescaler:
    """Searches the scale of one input, and quantizes the linears that read it."""

    def __init__(self, method: Awq, linears: Linears, group: InputStatistics) -> None:
        self._method, self._linears, self._group = method, linears, group
        self._gram = InputGram(group.moment.matrix())

    def scale(
        self, targets: Sequence[Target], realize: Callable[[Tensor], Tensor]
    ) -> Tensor | None:
        steps, clip = self._method.scale_steps, self._method.clip_search
        return search_scale(targets, self._gram, realize, steps=steps, clip=clip)

    def quantize(self, name: str, target: Target, scale: Tensor | None) -> QuantizedLinear:
        rounded = quantize_target(target, self._gram, scale, clip=self._method.clip_search)
        error = rounded.loss / output_energy(self._group, name)
        return QuantizedLinear(rounded.tensor, self._linears.report(name, error, "outputs"))
