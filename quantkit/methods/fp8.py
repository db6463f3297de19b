"""FP8: each row scaled to the range of float8_e4m3fn, whose nearest value is the code.

Micikevicius et al., arXiv 2209.05433. Four bits of exponent, three of mantissa, no infinity; the
largest value is 448, so a row's scale is its absmax / 448, rounded as those of integer grids are.
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
    """One scale a row; the linear's inputs are rounded to FP8 too, a token at a time.

    Others also have one scale a tensor (``per_row`` false), inputs with one scale for all
    (``static``), or inputs that are left alone.
    """

    per_row: bool = True
    rounds_inputs: bool = True
    static: bool = False

    def __str__(self) -> str:
        inputs = f", inputs {'static ' if self.static else ''}fp8" if self.rounds_inputs else ""
        return f"fp8 {'row' if self.per_row else 'tensor'}{inputs}"


@dataclass(frozen=True)
class Fp8Tensor:
    """codes: float8_e4m3fn (out, in); scales: float32 (out, 1), exact in fp16 and bf16.

    Others' scales may be of any value, and one for all (1, 1).
    """

    codes: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    def cpu(self) -> Fp8Tensor:
        return Fp8Tensor(self.codes.cpu(), self.scales.cpu())

    def dequantize(self) -> Tensor:
        return self.codes.float() * self.scales


class Fp8(LinearMethod):
    """Weights and inputs of linears in FP8 (E4M3), arXiv 2209.05433."""

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
    """Quantize ``weight`` (out, in; any float dtype) to the nearest codes."""
    values = weight.float()
    scales = exact_scale(values.abs().amax(1, keepdim=True) / LARGEST)
    return Fp8Tensor(encode(values / scales), scales)


def encode(values: Tensor) -> Tensor:
    """The nearest codes. What is larger than the largest becomes that: there is no infinity."""
    return values.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
