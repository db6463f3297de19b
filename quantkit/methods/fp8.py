"""FP8: each row is scaled to the range of float8_e4m3fn, and rounded to its nearest values.

Micikevicius et al., arXiv 2209.05433. E4M3 has four bits of exponent, three of mantissa and no
infinity; its largest value is 448, so the scale of a row is its absmax / 448.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quantkit.methods.grids import exact_scale
from quantkit.methods.linears import BlockResult, Linears
from quantkit.methods.method import LinearMethod

LARGEST = 448.0  # of float8_e4m3fn


@dataclass(frozen=True)
class Fp8Scheme:
    """One scale for each row; the linear's inputs are rounded to FP8 too, each token by itself.

    Checkpoints of other tools may have one scale for the whole tensor (``per_row`` false), one
    scale for all inputs (``static``), or inputs that aren't rounded (``rounds_inputs`` false).
    """

    per_row: bool = True
    rounds_inputs: bool = True
    static: bool = False

    def __str__(self) -> str:
        inputs = f", inputs {'static ' if self.static else ''}fp8" if self.rounds_inputs else ""
        return f"fp8 {'row' if self.per_row else 'tensor'}{inputs}"


@dataclass(frozen=True)
class Fp8Tensor:
    """A weight in FP8.

    codes: (out, in) float8_e4m3fn; scales: (out, 1) float32, exact in fp16 and bf16. Checkpoints of
    other tools may have any scales, and one for all rows, (1, 1).
    """

    codes: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    def dequantize(self) -> Tensor:
        return self.codes.float() * self.scales


class Fp8(LinearMethod):
    """FP8, arXiv 2209.05433: weights and inputs of linears in float8_e4m3fn."""

    tag = "fp8"
    calibration = "unused"
    rounds_inputs = True

    method: Literal["fp8"]
    format: Literal["compressed-tensors"] = "compressed-tensors"

    def needs(self) -> None:
        return None

    def default_scheme(self) -> Fp8Scheme:
        return Fp8Scheme()

    def quantize(self, linears: Linears) -> BlockResult:
        return linears.each(lambda weight, scheme: quantize(weight))


def quantize(weight: Tensor) -> Fp8Tensor:
    """``weight`` (out, in), of any float dtype, as the nearest FP8 values of scaled rows."""
    values = weight.float()
    scales = exact_scale(values.abs().amax(1, keepdim=True) / LARGEST)
    return Fp8Tensor(nearest_fp8(values / scales), scales)


def nearest_fp8(values: Tensor) -> Tensor:
    """The nearest values of float8_e4m3fn; those beyond the largest become the largest."""
    # The cast alone would make them NaN: the format has no infinity.
    return values.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
