"""ggml's types: their names, the sizes of their blocks, and tensors of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.base.errors import InputError
from quantkit.methods.ggml import library

CASTS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# The package gguf quantizes these too, to the same bytes where there are no importance weights.
PORTABLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
I_QUANTS = (
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"),
    *("IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
)
TERNARY = ("TQ1_0", "TQ2_0")
TYPES = (*CASTS, *PORTABLE, *K_QUANTS, *I_QUANTS, *TERNARY, "MXFP4")


@dataclass(frozen=True)
class GgmlTensor:
    """A tensor in one of ggml's types.

    blocks: (rows, bytes of a row) uint8, rows being the product of all dimensions but the last of
    ``shape``.
    """

    type: str
    blocks: Tensor
    shape: tuple[int, ...]

    def dequantize(self) -> Tensor:
        """The value in float32, of ``shape``: by ggml's decoders, or by gguf's where it lacks."""
        if self.type in CASTS:
            return self.blocks.view(CASTS[self.type]).float().view(self.shape)
        gguf = library.load_gguf()
        kind = gguf.GGMLQuantizationType[self.type]
        ggml = library.load_quantizer()
        if ggml is None:
            values = gguf.quants.dequantize(self.blocks.numpy(), kind)
            return torch.from_numpy(values).view(self.shape)
        result = torch.empty(self.shape)
        decode = ggml.ggml_get_type_traits(int(kind)).contents.to_float
        decode(self.blocks.contiguous().data_ptr(), result.data_ptr(), result.numel())
        return result


@functools.cache
def block_size(type: str) -> tuple[int, int]:
    """The elements and the bytes of one block. Raises InputError for an unknown type."""
    if type not in TYPES:
        raise InputError(f"unknown ggml type {type!r}", fix=f"Known types: {', '.join(TYPES)}.")
    gguf = library.load_gguf()
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]]
    return int(elements), int(size)


def row_bytes(type: str, columns: int) -> int:
    """The bytes of a row of ``columns``. Raises InputError where blocks don't divide it."""
    elements, size = block_size(type)
    if columns % elements:
        raise InputError(f"rows of {columns} can't be cut into {type}'s blocks of {elements}")
    return columns // elements * size


def available() -> tuple[str, ...]:
    """The types that this machine can quantize to."""
    return TYPES if library.load_quantizer() is not None else (*CASTS, *PORTABLE)
