"""NF4 by bitsandbytes' own kernels: the 4-bit NormalFloat of QLoRA (arXiv 2305.14314).

Blocks of ``block_size`` consecutive weights (row-major) share one absolute maximum; each weight
becomes the nearest of 16 fixed quantiles of the normal distribution. With double quantization
the maxima are themselves stored in 8 bits, in blocks of 256.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from quantkit.base.errors import not_installed
from quantkit.methods.grids import Quantized
from quantkit.methods.linears import BlockResult, Linears
from quantkit.methods.method import LinearMethod

# Weights that the kernel quantizes at a time, for each of which it needs ten bytes. A multiple of
# every block size.
_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Nf4Scheme:
    """block_size: weights per block; double_quant: whether the blocks' maxima are quantized too.

    kind: nf4, or fp4 in checkpoints of other tools.
    """

    block_size: int
    double_quant: bool
    kind: str = "nf4"
    rounds_inputs: bool = False

    def __str__(self) -> str:
        return f"{self.kind} b{self.block_size}{' double' if self.double_quant else ''}"


@dataclass(frozen=True)
class Nf4Tensor:
    """A weight as bitsandbytes packs it: codes, uint8 (numel/2, 1), and its QuantState."""

    packed: Tensor
    state: Any
    shape: tuple[int, ...]

    def computed(self) -> Tensor:
        """The weight that bitsandbytes computes with, in the dtype that it had before."""
        value: Tensor = bitsandbytes_functions().dequantize_4bit(self.packed, self.state)
        return value

    def dequantize(self) -> Tensor:
        return self.computed().float()


class Nf4(LinearMethod):
    """NF4, arXiv 2305.14314, by bitsandbytes' own kernels."""

    tag = "nf4"
    calibration = "unused"

    method: Literal["nf4"]
    block_size: Literal[64, 128, 256, 512, 1024, 2048, 4096] = 64
    double_quant: bool = True
    format: Literal["bitsandbytes"] = "bitsandbytes"

    def check_available(self) -> None:
        bitsandbytes_functions()

    def needs(self) -> None:
        return None

    def default_scheme(self) -> Nf4Scheme:
        return Nf4Scheme(self.block_size, self.double_quant)

    def quantize(self, linears: Linears) -> BlockResult:
        # The format has one scheme for all linears.
        scheme = self.default_scheme()
        return linears.each(lambda weight, _: quantize(weight, scheme), _computed)


def _computed(tensor: Quantized) -> Tensor:
    # In its own dtype: the report's float32 copies are of some rows at a time.
    assert isinstance(tensor, Nf4Tensor)
    return tensor.computed()


def quantize(weight: Tensor, scheme: Nf4Scheme) -> Nf4Tensor:
    """Quantize ``weight`` (out, in) of dtype float32, float16 or bfloat16."""
    bnb = bitsandbytes_functions()
    parts = [
        bnb.quantize_4bit(
            part,
            blocksize=scheme.block_size,
            compress_statistics=False,
            quant_type="nf4",
            quant_storage=torch.uint8,
        )
        for part in weight.contiguous().view(-1).split(_AT_ONCE)
    ]
    packed, state = torch.cat([packed for packed, _ in parts]), parts[0][1]
    state.shape, state.absmax = weight.shape, torch.cat([state.absmax for _, state in parts])
    # The maxima of all blocks together, with the bytes of ``quantize_4bit`` on the whole weight.
    if scheme.double_quant:
        state.offset, state.nested = state.absmax.mean(), True
        maxima = state.absmax - state.offset
        state.absmax, state.state2 = bnb.quantize_blockwise(maxima, blocksize=256)
    return Nf4Tensor(packed, state, tuple(weight.shape))


def bitsandbytes_functions() -> Any:
    """The module of bitsandbytes' functions. Raises MachineError where it isn't installed."""
    try:
        import bitsandbytes.functional as functional
    except ImportError as error:
        raise not_installed("bitsandbytes", "nf4") from error
    return functional
