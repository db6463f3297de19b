"""Methods by llama.cpp's mixes, each of which gives every tensor of a GGUF file its type."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Protocol

from pydantic import Field
from torch import Tensor

from quantkit.calibration.needs import Needs
from quantkit.calibration.statistics import InputStatistics
from quantkit.documents.document import Strict
from quantkit.methods.linears import QuantizedLinear
from quantkit.methods.method import Method

# fmt: off
MixName = Literal[
    "f32", "bf16", "f16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m",
    "q4_k_s", "q4_1", "q4_0", "iq4_nl", "iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s", "iq3_m",
    "iq3_s", "iq3_xs", "iq3_xxs", "q2_k", "q2_k_s", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs",
    "iq1_m", "iq1_s", "tq2_0", "tq1_0",
]
# fmt: on


class MixOverride(Strict):
    """Another ggml type for the tensors whose GGUF name matches a glob; the last match wins."""

    match: str
    type: str


class Matrix(Protocol):
    """A matrix of the GGUF file to be written.

    name: its name in the file; key: its name in the checkpoint; type: ggml's; shape: (out, in).
    """

    @property
    def name(self) -> str: ...

    @property
    def key(self) -> str | None: ...

    @property
    def type(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` before they are quantized, in the order of the file."""
        ...


class MixMethod(Method):
    """A method that gives every tensor the type that one of llama.cpp's mixes has for it.

    measures_output: whether ``quantize_output`` quantizes the output matrix, so that what it reads
    must be measured. ggml quantizes all that ``quantize`` and ``quantize_output`` don't return,
    when the file is written, with importance weights where the recipe calibrates.
    """

    mix: MixName
    format: Literal["gguf"] = "gguf"
    overrides: list[MixOverride] = Field(default=[])
    no_fallback: bool = Field(
        default=False, description="refuse rows that the mix's type can't hold"
    )
    pre_tokenizer: str | None = Field(
        default=None, description="llama.cpp's name, where none can be shown to be the right one"
    )

    measures_output: ClassVar[bool] = False

    @abstractmethod
    def needs(self) -> Needs: ...

    def quantize(
        self, inputs: Sequence[InputStatistics], matrices: Mapping[str, Matrix]
    ) -> dict[str, QuantizedLinear]:
        """Quantize matrices that read ``inputs``; the result is by their names in the file.

        matrices: those of one block, by the names of its linears.
        """
        return {}

    def quantize_output(
        self, inputs: InputStatistics, matrix: Matrix, *, tied: bool
    ) -> dict[str, QuantizedLinear]:
        """Quantize the matrix that makes the logits; the result is by its name in the file.

        tied: whether it is the embedding too.
        """
        return {}


class Ggml(MixMethod):
    """ggml's own rounding to its types, with importance weights where the recipe calibrates."""

    tag = "ggml"
    calibration = "optional"

    method: Literal["ggml"]

    def needs(self) -> Needs:
        return Needs("diagonal")
