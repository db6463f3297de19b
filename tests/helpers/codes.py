"""Random quantized tensors, and the packed words of formats."""

from __future__ import annotations

import torch

from quantkit.methods.grids import Grid, QuantizedTensor


def random_tensor(grid: Grid, rows: int = 64, columns: int = 128) -> QuantizedTensor:
    """Seeded random codes (rows, columns), with scales that float16 holds exactly."""
    generator = torch.Generator().manual_seed(grid.bits)
    groups = columns // grid.columns(columns)
    low = grid.middle if grid.symmetric else grid.first_zero
    high = grid.middle if grid.symmetric else grid.levels
    return QuantizedTensor(
        grid,
        torch.randint(0, grid.levels + 1, (rows, columns), generator=generator, dtype=torch.uint8),
        torch.rand(rows, groups, generator=generator).half().float(),
        torch.randint(low, high + 1, (rows, groups), generator=generator, dtype=torch.uint8),
    )


def unsigned(word: torch.Tensor) -> int:
    """A word of int32 as the unsigned number that its 32 bits are."""
    return int(word) & 0xFFFFFFFF
