"""Integer grids in ggml's plain types, code for code.

ggml's blocks of 32 hold ``d · q`` (Q4_0, Q5_0, Q8_0: q is signed) or ``d · q + m`` (Q4_1, Q5_1),
with d and m in fp16. A grid of as many bits with groups of 32 is the same thing: d is its scale
and m = -z·s, which fp16 holds because the plan asks for scales of few enough bits
(``Grid.exact_minimum``). Reference: ``ggml/src/ggml-common.h`` of llama.cpp.
"""

from __future__ import annotations

from typing import Any

import torch

from quantkit.base.errors import InputError
from quantkit.formats.gguf.transforms import Transform
from quantkit.methods.ggml.blocks import LAYOUTS, Blocks
from quantkit.methods.ggml.types import GgmlTensor, row_bytes
from quantkit.methods.grids import Grid, QuantizedTensor

FIRST_ZERO = 0
_GROUP = 32
_TYPES = {
    (4, True): "Q4_0",
    (4, False): "Q4_1",
    (5, True): "Q5_0",
    (5, False): "Q5_1",
    (8, True): "Q8_0",
}


def ggml_type(grid: Grid) -> str:
    """The type that holds a grid. Raises KeyError where none does."""
    return _TYPES[grid.bits, grid.symmetric]


def check(name: str, shape: tuple[int, int], grid: Grid, default: Grid) -> None:
    """Raise InputError when no type of ggml's holds this linear's grid."""
    if grid.group_size == _GROUP and (grid.bits, grid.symmetric) in _TYPES:
        return
    held = "; ".join(
        f"{bits} bits {'symmetric' if symmetric else 'asymmetric'} ({type})"
        for (bits, symmetric), type in _TYPES.items()
    )
    raise InputError(
        f"gguf has no type for {grid}",
        where=name,
        fix=f"Choose group_size: 32 with one of: {held}. Or name a mix (methods ggml and gptq), "
        "or take another format: awq, gptq, compressed-tensors.",
    )


def nbytes(shape: tuple[int, int], grid: Grid) -> int:
    """Bytes of one linear."""
    return shape[0] * row_bytes(ggml_type(grid), shape[1])


def config(default: Grid, grids: dict[str, Grid], skipped: list[str]) -> dict[str, Any]:
    """Nothing: the file says the type of every tensor itself."""
    return {}


def pack(tensor: QuantizedTensor, transform: Transform) -> GgmlTensor:
    """Codes, scales and zeros → blocks, their rows in the order that ``transform`` gives them."""
    type = ggml_type(tensor.grid)
    codes, scales, zeros = map(transform.apply, (tensor.codes, tensor.scales, tensor.zeros))
    codes = codes.to(torch.int16)
    if not LAYOUTS[type].has_min:
        codes -= tensor.grid.middle
    minima = scales * zeros
    return Blocks(type, codes, scales, scales, minima, minima).pack()
