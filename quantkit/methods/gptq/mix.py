"""GPTQ on the grids of llama.cpp's types: its settings in a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from quantkit.calibration.needs import Needs
from quantkit.calibration.statistics import InputStatistics
from quantkit.methods.ggml.matrices import quantize_matrices, quantize_output_matrix
from quantkit.methods.ggml.method import Matrix, MixMethod
from quantkit.methods.gptq.method import DampPercent, names_a_mix
from quantkit.methods.linears import QuantizedLinear

# A tied output matrix is the embedding too, whose rows are looked up one by one: the hessian of the
# logits says nothing about that use. More damping keeps the rows closer to their originals
# (docs/quality.md).
_TIED_DAMPING = 0.1


class GptqMix(MixMethod):
    """GPTQ, arXiv 2210.17323, on the grids of llama.cpp's types."""

    tag = "gptq-gguf"
    calibration = "required"
    measures_output = True

    method: Literal["gptq"]
    # Unlike ggml, a recipe must name the format: method gptq alone means an integer grid.
    format: Literal["gguf"]
    damp_percent: DampPercent = 0.01
    propagate: Literal["original", "corrected"] = "original"

    @classmethod
    def describes(cls, section: Mapping[str, Any]) -> bool:
        return section.get("method") == "gptq" and names_a_mix(section)

    def needs(self) -> Needs:
        return Needs("gram", propagate=self.propagate)

    def quantize(
        self, inputs: Sequence[InputStatistics], matrices: Mapping[str, Matrix]
    ) -> dict[str, QuantizedLinear]:
        return quantize_matrices(inputs, matrices, self.damp_percent)

    def quantize_output(
        self, inputs: InputStatistics, matrix: Matrix, *, tied: bool
    ) -> dict[str, QuantizedLinear]:
        damping = max(self.damp_percent, _TIED_DAMPING) if tied else self.damp_percent
        return quantize_output_matrix(inputs, matrix, damping)
