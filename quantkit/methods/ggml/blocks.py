"""The blocks of ggml's scalar types: what a code stands for, and where its bits lie.

A weight is ``d · scale · q - dmin · min``, computed in float32 from left to right. ``q`` is the
weight's own code, of 2 to 8 bits; ``scale`` and ``min`` are small integers of its group of 16 or
32 columns; ``d`` and ``dmin`` are fp16 numbers of its block. The plain types (Q4_0 … Q8_0, IQ4_NL)
have blocks of one group, with ``d`` (and ``dmin``) alone. In IQ4_NL and IQ4_XS ``q`` is looked up
in a table of 16 values. The codebook types (IQ1 … IQ3) are not of this form: there, one code
stands for several weights.

Reference: ``ggml/src/ggml-common.h`` and ``gguf-py/gguf/quants.py`` of llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quantkit.methods.ggml.types import GgmlTensor

_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Bits:
    """A field of a block: ``bits`` bits, from bit ``low`` on, of each of some integers.

    The first ``width`` integers go to the lowest bits of ``width`` bytes, the next ``width`` to
    the next higher bits of the same bytes, and so on until these are full.
    """

    of: Literal["codes", "scales", "scales and mins"]
    low: int
    bits: int
    width: int

    def pack(self, integers: Tensor) -> Tensor:
        """uint8 (…, n) → uint8 (…, n · bits / 8)."""
        parts = ((integers >> self.low) & ((1 << self.bits) - 1)).unflatten(
            -1, (-1, 8 // self.bits, self.width)
        )
        packed = parts[..., 0, :].clone()
        for index in range(1, 8 // self.bits):
            packed |= parts[..., index, :] << (self.bits * index)
        return packed.flatten(-2)


@dataclass(frozen=True)
class Layout:
    """One type.

    columns: of a block. group: columns that share a scale. codes: the range of ``q``; of its
    values, where there is a table of them. fields: a block's bytes in order; "d", "dmin" and
    "-dmin" are fp16, "6 bits" are Q4_K's scales and mins. scales, mins: ranges of the integers;
    (1, 1) where ``d`` or ``dmin`` stands alone, (0, 0) without a minimum. code_bias, scale_bias:
    what is added to ``q`` and ``scale`` for storing them.
    """

    columns: int
    group: int
    codes: tuple[int, int]
    fields: tuple[str | Bits, ...]
    scales: tuple[int, int] = (1, 1)
    mins: tuple[int, int] = (0, 0)
    code_bias: int = 0
    scale_bias: int = 0
    table: tuple[int, ...] = ()

    @property
    def has_min(self) -> bool:
        return self.mins != (0, 0)


_HALVES = Bits("codes", 0, 4, 16)  # of 32 codes: the first 16 in the low nibbles
_FIFTH = Bits("codes", 4, 1, 1)
_ALONE = (1, 1)

LAYOUTS = {
    "Q4_0": Layout(32, 32, (-8, 7), ("d", _HALVES), code_bias=8),
    "Q4_1": Layout(32, 32, (0, 15), ("d", "-dmin", _HALVES), mins=_ALONE),
    "Q5_0": Layout(32, 32, (-16, 15), ("d", _FIFTH, _HALVES), code_bias=16),
    "Q5_1": Layout(32, 32, (0, 31), ("d", "-dmin", _FIFTH, _HALVES), mins=_ALONE),
    "Q8_0": Layout(32, 32, (-127, 127), ("d", Bits("codes", 0, 8, 32))),
    "Q2_K": Layout(
        256,
        16,
        (0, 3),
        (Bits("scales and mins", 0, 4, 16), Bits("codes", 0, 2, 32), "d", "dmin"),
        scales=(0, 15),
        mins=(0, 15),
    ),
    "Q3_K": Layout(
        256,
        16,
        (-4, 3),
        (
            Bits("codes", 2, 1, 32),
            Bits("codes", 0, 2, 32),
            Bits("scales", 0, 4, 8),
            Bits("scales", 4, 2, 4),
            "d",
        ),
        scales=(-32, 31),
        code_bias=4,
        scale_bias=32,
    ),
    "Q4_K": Layout(
        256,
        32,
        (0, 15),
        ("d", "dmin", "6 bits", Bits("codes", 0, 4, 32)),
        scales=(0, 63),
        mins=(0, 63),
    ),
    "Q5_K": Layout(
        256,
        32,
        (0, 31),
        ("d", "dmin", "6 bits", Bits("codes", 4, 1, 32), Bits("codes", 0, 4, 32)),
        scales=(0, 63),
        mins=(0, 63),
    ),
    "Q6_K": Layout(
        256,
        16,
        (-32, 31),
        (Bits("codes", 0, 4, 64), Bits("codes", 4, 2, 32), Bits("scales", 0, 8, 16), "d"),
        scales=(-128, 127),
        code_bias=32,
    ),
    "IQ4_NL": Layout(32, 32, (-127, 113), ("d", _HALVES), table=_IQ4),
    "IQ4_XS": Layout(
        256,
        32,
        (-127, 113),
        ("d", Bits("scales", 4, 2, 1), Bits("scales", 0, 4, 1), _HALVES),
        scales=(-32, 31),
        scale_bias=32,
        table=_IQ4,
    ),
}


@dataclass(frozen=True)
class Blocks:
    """A matrix (out, in) of one type, unpacked.

    codes: (out, in), ``q``, or its index where the type has a table; d, dmin: (out, blocks),
    exact in fp16; scales, mins: (out, groups). All of any dtype that holds them; dmin and mins
    are not looked at where the type has no minimum.
    """

    type: str
    codes: Tensor
    d: Tensor
    scales: Tensor
    dmin: Tensor
    mins: Tensor

    def pack(self) -> GgmlTensor:
        """The bytes that ggml reads."""
        layout = LAYOUTS[self.type]
        parts = [self._field(field, layout) for field in layout.fields]
        packed = torch.cat(parts, -1).flatten(1)
        return GgmlTensor(self.type, packed.cpu(), tuple(self.codes.shape))

    def _field(self, field: str | Bits, layout: Layout) -> Tensor:
        """The bytes of one field, (out, blocks, n)."""
        if field in ("d", "dmin", "-dmin"):
            value = {"d": self.d, "dmin": self.dmin, "-dmin": -self.dmin}[str(field)]
            return value.to(torch.float16).flatten().view(torch.uint8).view(*value.shape, 2)
        shape = (*self.d.shape, -1)
        if isinstance(field, Bits) and field.of == "codes":
            return field.pack(_bytes(self.codes, layout.code_bias).view(shape))
        scales = _bytes(self.scales, layout.scale_bias).view(shape)
        if isinstance(field, Bits) and field.of == "scales":
            return field.pack(scales)
        mins = _bytes(self.mins, 0).view(shape)
        if isinstance(field, Bits):
            return field.pack(torch.cat((scales, mins), -1))
        return _six_bits(scales, mins)


def _bytes(integers: Tensor, bias: int) -> Tensor:
    """Integers as uint8, negative ones in two's complement."""
    return (integers.to(torch.int16) + bias).to(torch.int8).contiguous().view(torch.uint8)


def _six_bits(scales: Tensor, mins: Tensor) -> Tensor:
    """Eight scales and eight minima of 6 bits, (…, 8) each, in 12 bytes."""
    first = scales[..., :4] | (scales[..., 4:] >> 4 << 6)
    second = mins[..., :4] | (mins[..., 4:] >> 4 << 6)
    third = (scales[..., 4:] & 15) | (mins[..., 4:] << 4)
    return torch.cat((first, second, third), -1)
