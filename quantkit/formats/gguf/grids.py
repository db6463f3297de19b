"""The GGUF format for integer grids: ggml's plain types hold them, code for code.

ggml's blocks of 32 hold ``d · q`` (Q4_0, Q5_0, Q8_0: q is signed) or ``d · q + m`` (Q4_1, Q5_1),
with d and m in fp16. A grid of as many bits with groups of 32 is the same thing: d is its scale
and m = -z·s, which fp16 holds because the plan asks for scales of few enough bits
(``Grid.exact_minimum``). Reference: ``ggml/src/ggml-common.h`` of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from quantkit.base.errors import InputError
from quantkit.formats.format import Contents, Format, Loading, expect
from quantkit.formats.gguf.transforms import Transform
from quantkit.methods.ggml.blocks import LAYOUTS, Blocks
from quantkit.methods.ggml.types import GgmlTensor, row_bytes
from quantkit.methods.grids import Grid, QuantizedTensor

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


class GgufFormat(Format):
    """Grids in groups of 32. The types of a mix are chosen in ``tensor_types.py``."""

    name = "gguf"
    holds = (Grid,)
    exact_minimum = True  # of Q4_1 and Q5_1

    def check_scheme(
        self, name: str, shape: tuple[int, int], scheme: object, default: object
    ) -> None:
        super().check_scheme(name, shape, scheme, default)
        grid = expect(scheme, Grid)
        known = (grid.bits, grid.symmetric) in _TYPES
        if known and grid.group_size == _GROUP and not grid.rounds_inputs:
            return
        held = "; ".join(
            f"{bits} bits {'symmetric' if symmetric else 'asymmetric'} ({type})"
            for (bits, symmetric), type in _TYPES.items()
        )
        raise InputError(
            f"the gguf format has no type for {grid}",
            where=name,
            fix=f"Choose group_size: 32 with one of: {held}. Or name a mix (methods ggml and "
            "gptq), or take another format: awq, gptq, compressed-tensors.",
        )

    def nbytes(self, shape: tuple[int, int], scheme: object, dtype: torch.dtype) -> int:
        return shape[0] * row_bytes(ggml_type(expect(scheme, Grid)), shape[1])

    def config(
        self,
        default: object,
        schemes: Mapping[str, object],
        skipped: Sequence[str],
        dtype: torch.dtype,
    ) -> dict[str, Any]:
        return {}  # the file's header has the type of every tensor

    def loading(self, contents: Contents) -> tuple[Loading, ...]:
        """Of a file of any types that llama.cpp has."""
        return (
            Loading("llama.cpp", "yes"),
            Loading("transformers", "yes", "with gguf; dequantizes it when loading"),
            Loading("vLLM", "no", "0.32 has no GGUF method"),
        )


def pack_blocks(tensor: QuantizedTensor, transform: Transform) -> GgmlTensor:
    """Codes, scales and zero points of a linear → blocks; ``transform``: what reorders its rows."""
    type = ggml_type(tensor.grid)
    codes, scales, zeros = map(transform.apply, (tensor.codes, tensor.scales, tensor.zeros))
    codes = codes.to(torch.int16)
    if not LAYOUTS[type].has_min:
        codes -= tensor.grid.middle
    minima = scales * zeros
    return Blocks(type, codes, scales, scales, minima, minima).pack()
