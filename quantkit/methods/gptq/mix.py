"""GPTQ as a recipe names it, on the grids of llama.cpp's types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from quantkit.calibration.needs import Needs
from quantkit.calibration.statistics import InputStatistics
from quantkit.methods.ggml.matrices import quantize_matrix, quantize_readers
from quantkit.methods.ggml.method import Matrix, MixMethod
from quantkit.methods.gptq.method import DampPercent, names_a_mix
from quantkit.methods.linears import QuantizedLinear

# The rows of a matrix that is the embedding too are also read one by one, where no Hessian
# speaks for them: more damping keeps them closer to what they were (docs/quality.md).
_TIED_DAMPING = 0.1


class GptqMix(MixMethod):
    """GPTQ's error feedback on the grids of llama.cpp's types."""

    tag = "gptq-gguf"
    calibration = "required"
    measures_output = True

    method: Literal["gptq"]
    # Required, unlike ggml's: without it, method gptq means an integer grid.
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
        return quantize_readers(inputs, matrices, self.damp_percent)

    def quantize_output(
        self, inputs: InputStatistics, matrix: Matrix, *, tied: bool
    ) -> dict[str, QuantizedLinear]:
        damping = max(self.damp_percent, _TIED_DAMPING) if tied else self.damp_percent
        return quantize_matrix(inputs, matrix, damping)
