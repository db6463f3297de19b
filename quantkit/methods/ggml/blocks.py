"""The blocks of ggml's scalar types: which weight a code gives, and where its bits are stored.

A weight is ``d · scale · q - dmin · min``, computed in float32 from left to right. ``q`` is the
weight's own code, of 2 to 8 bits; ``scale`` and ``min`` are small integers of its group of 16 or
32 columns; ``d`` and ``dmin`` are fp16 numbers of its block. The plain types (Q4_0 … Q8_0, IQ4_NL)
have blocks of one group, with ``d`` (and ``dmin``) alone. In IQ4_NL and IQ4_XS ``q`` is looked up
in a table of 16 values. The codebook types (IQ1 … IQ3), where one code gives several weights, are
not of this form.

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
class BitField:
    """A field of a block: ``bits`` bits of each of its integers, from bit ``low`` on.

    of: which integers. The first ``width`` integers are stored in the lowest bits of ``width``
    bytes, the next ``width`` in the next higher bits of the same bytes, and so on until these are
    full.
    """

    of: Literal["codes", "scales", "scales and mins"]
    low: int
    bits: int
    width: int

    def pack(self, integers: Tensor) -> Tensor:
        """The bytes (…, n · bits / 8) uint8 of ``integers`` (…, n) uint8."""
        parts = ((integers >> self.low) & ((1 << self.bits) - 1)).unflatten(
            -1, (-1, 8 // self.bits, self.width)
        )
        packed = parts[..., 0, :].clone()
        for index in range(1, 8 // self.bits):
            packed |= parts[..., index, :] << (self.bits * index)
        return packed.flatten(-2)

    def unpack(self, packed: Tensor) -> Tensor:
        """The bits of the integers, in their place, (…, n) uint8, from the field's bytes."""
        rows = packed.unflatten(-1, (-1, self.width))
        mask = (1 << self.bits) - 1
        parts = [(rows >> self.bits * index) & mask for index in range(8 // self.bits)]
        return torch.stack(parts, -2).flatten(-3) << self.low


@dataclass(frozen=True)
class BlockLayout:
    """The blocks of one type.

    columns: of a block; group: columns that share a scale; codes: the lowest and highest ``q``, or
    value in the table where there is one; fields: a block's bytes in order, where "d", "dmin" and
    "-dmin" are fp16, and "6 bits" are the scales and minima of Q4_K; scales, mins: lowest and
    highest ``scale`` and ``min``: (1, 1) where there is only ``d`` or ``dmin``, mins (0, 0) where
    there is no minimum; code_bias, scale_bias: are added to ``q`` and ``scale`` before they are
    stored; table: the values of ``q``.
    """

    columns: int
    group: int
    codes: tuple[int, int]
    fields: tuple[str | BitField, ...]
    scales: tuple[int, int] = (1, 1)
    mins: tuple[int, int] = (0, 0)
    code_bias: int = 0
    scale_bias: int = 0
    table: tuple[int, ...] = ()

    @property
    def has_min(self) -> bool:
        """Whether weights have a minimum, ``dmin · min``."""
        return self.mins != (0, 0)


_HALVES = BitField("codes", 0, 4, 16)  # of 32 codes: the first 16 in the low nibbles
_FIFTH = BitField("codes", 4, 1, 1)  # the fifth bits of 32 codes, in order
_ALONE = (1, 1)

# Q4_1 and Q5_1 add their minimum where the formula subtracts it, so they store "-dmin".
LAYOUTS = {
    "Q4_0": BlockLayout(32, 32, (-8, 7), ("d", _HALVES), code_bias=8),
    "Q4_1": BlockLayout(32, 32, (0, 15), ("d", "-dmin", _HALVES), mins=_ALONE),
    "Q5_0": BlockLayout(32, 32, (-16, 15), ("d", _FIFTH, _HALVES), code_bias=16),
    "Q5_1": BlockLayout(32, 32, (0, 31), ("d", "-dmin", _FIFTH, _HALVES), mins=_ALONE),
    "Q8_0": BlockLayout(32, 32, (-127, 127), ("d", BitField("codes", 0, 8, 32))),
    "Q2_K": BlockLayout(
        256,
        16,
        (0, 3),
        (BitField("scales and mins", 0, 4, 16), BitField("codes", 0, 2, 32), "d", "dmin"),
        scales=(0, 15),
        mins=(0, 15),
    ),
    "Q3_K": BlockLayout(
        256,
        16,
        (-4, 3),
        (
            BitField("codes", 2, 1, 32),
            BitField("codes", 0, 2, 32),
            BitField("scales", 0, 4, 8),
            BitField("scales", 4, 2, 4),
            "d",
        ),
        scales=(-32, 31),
        code_bias=4,
        scale_bias=32,
    ),
    "Q4_K": BlockLayout(
        256,
        32,
        (0, 15),
        ("d", "dmin", "6 bits", BitField("codes", 0, 4, 32)),
        scales=(0, 63),
        mins=(0, 63),
    ),
    "Q5_K": BlockLayout(
        256,
        32,
        (0, 31),
        ("d", "dmin", "6 bits", BitField("codes", 4, 1, 32), BitField("codes", 0, 4, 32)),
        scales=(0, 63),
        mins=(0, 63),
    ),
    "Q6_K": BlockLayout(
        256,
        16,
        (-32, 31),
        (
            BitField("codes", 0, 4, 64),
            BitField("codes", 4, 2, 32),
            BitField("scales", 0, 8, 16),
            "d",
        ),
        scales=(-128, 127),
        code_bias=32,
    ),
    "IQ4_NL": BlockLayout(32, 32, (-127, 113), ("d", _HALVES), table=_IQ4),
    "IQ4_XS": BlockLayout(
        256,
        32,
        (-127, 113),
        ("d", BitField("scales", 4, 2, 1), BitField("scales", 0, 4, 1), _HALVES),
        scales=(-32, 31),
        scale_bias=32,
        table=_IQ4,
    ),
}


@dataclass(frozen=True)
class Blocks:
    """A matrix (out, in) of one type, unpacked.

    codes: (out, in), ``q`` or its index in the type's table; d, dmin: (out, blocks), exact in fp16;
    scales, mins: (out, groups). All are of any dtype that holds them; dmin and mins are ignored
    where the type has no minimum.
    """

    type: str
    codes: Tensor
    d: Tensor
    scales: Tensor
    dmin: Tensor
    mins: Tensor

    def pack(self) -> GgmlTensor:
        """The bytes that ggml reads, on the device of the codes."""
        layout = LAYOUTS[self.type]
        parts = [self._field(field, layout) for field in layout.fields]
        packed = torch.cat(parts, -1).flatten(1)
        return GgmlTensor(self.type, packed, tuple(self.codes.shape))

    def _field(self, field: str | BitField, layout: BlockLayout) -> Tensor:
        """The bytes of one field, (out, blocks, n)."""
        if field in ("d", "dmin", "-dmin"):
            value = {"d": self.d, "dmin": self.dmin, "-dmin": -self.dmin}[str(field)]
            return value.to(torch.float16).flatten().view(torch.uint8).view(*value.shape, 2)
        shape = (*self.d.shape, -1)
        if isinstance(field, BitField) and field.of == "codes":
            return field.pack(_bytes(self.codes, layout.code_bias).view(shape))
        scales = _bytes(self.scales, layout.scale_bias).view(shape)
        if isinstance(field, BitField) and field.of == "scales":
            return field.pack(scales)
        mins = _bytes(self.mins, 0).view(shape)
        if isinstance(field, BitField):
            return field.pack(torch.cat((scales, mins), -1))
        return _six_bits(scales, mins)


def _bytes(integers: Tensor, bias: int) -> Tensor:
    """``integers + bias`` as uint8, negative ones in two's complement."""
    return (integers.to(torch.int16) + bias).to(torch.int8).contiguous().view(torch.uint8)


def _six_bits(scales: Tensor, mins: Tensor) -> Tensor:
    """Eight scales and eight minima of 6 bits, (…, 8) uint8 each, in 12 bytes."""
    # The first four of each take the lower six bits of a byte; the others are cut into their upper
    # two bits, stored above those six, and their lower four, two to a byte.
    first = scales[..., :4] | (scales[..., 4:] >> 4 << 6)
    second = mins[..., :4] | (mins[..., 4:] >> 4 << 6)
    third = (scales[..., 4:] & 15) | (mins[..., 4:] << 4)
    return torch.cat((first, second, third), -1)


def decoded(tensor: GgmlTensor, device: torch.device) -> Tensor:
    """The value of a matrix of one of these types, (out, in) float32, computed on ``device``.

    It is that of ``GgmlTensor.dequantize``, bit for bit.
    """
    layout, (rows, columns) = LAYOUTS[tensor.type], tensor.shape
    count = layout.columns // layout.group
    blocks = tensor.blocks.to(device).view(rows, columns // layout.columns, -1)
    numbers = {"codes": layout.columns, "scales": count, "scales and mins": 2 * count}
    found: dict[str, Tensor] = {}
    at = 0
    for field in layout.fields:
        size = 12 if field == "6 bits" else 2
        if isinstance(field, BitField):
            size = numbers[field.of] * field.bits // 8
        part = blocks[..., at : at + size]
        at += size
        if isinstance(field, BitField):
            bits = field.unpack(part)
            found[field.of] = found[field.of] | bits if field.of in found else bits
        elif field == "6 bits":
            found["scales and mins"] = _from_six_bits(part)
        else:
            found[field] = part.contiguous().view(torch.float16).float()
    if "scales and mins" in found:
        found["scales"], found["mins"] = found["scales and mins"].chunk(2, -1)
    step, codes = found["d"], found["codes"]
    if "scales" in found:
        step = step * _numbers(found["scales"], layout.scales[0], layout.scale_bias)
    minimum = -found["-dmin"] if "-dmin" in found else found.get("dmin")
    if minimum is not None and "mins" in found:
        minimum = minimum * found["mins"].float()
    if layout.table:
        table = torch.tensor(layout.table, dtype=torch.float32).to(device)
        values = table[codes.long()]
    else:
        values = _numbers(codes, layout.codes[0], layout.code_bias)
    values = values.unflatten(-1, (count, -1)) * step[..., None]
    return (values if minimum is None else values - minimum[..., None]).view(rows, columns)


def _numbers(stored: Tensor, lowest: int, bias: int) -> Tensor:
    """The integers that were stored as ``_bytes``, float32."""
    signed = stored.view(torch.int8) if lowest + bias < 0 else stored
    return signed.float() - bias


def _from_six_bits(packed: Tensor) -> Tensor:
    """Eight scales, then eight minima, (…, 16) uint8, from what ``_six_bits`` made of them."""
    first, second, third = packed.split(4, -1)
    scales = (first & 63, (third & 15) | (first >> 6 << 4))
    mins = (second & 63, (third >> 4) | (second >> 6 << 4))
    return torch.cat((*scales, *mins), -1)
