"""GPTQ: codes chosen column by column, each column's error carried on to those that follow.

Frantar et al., arXiv 2210.17323. With H = XᵀX + λI over the calibration tokens and U the upper
Cholesky factor of H⁻¹, quantizing column j with error e = (w_j - ŵ_j) / U_jj changes the columns
not yet done by -e · U_j. Columns are done in blocks: inside a block one at a time, the rest of
the matrix once per block by a matrix product.

Activation order is *static*: columns are visited by falling diagonal of H, but the groups and
their scales are those of the stored order, so that engines see no permutation (``desc_act:
false``, g_idx = k // group_size).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.quantizers import rtn
from quantkit.quantizers.grid import (
    Grid,
    QuantizedTensor,
    assemble,
    encode,
    fit,
    gram_loss,
    grouped,
    search_range,
    total,
)

_RETRIES = 4  # dampings tried, each ten times the one before
_CLIP_STEPS = 20
_SMALLEST_CLIP = 0.6  # share of a group's range


@dataclass(frozen=True)
class Settings:
    """damping: share of the mean diagonal added to it; block_size: columns per lazy update."""

    damping: float = 0.01
    activation_order: bool = True
    clip_search: bool = True
    block_size: int = 128


@dataclass(frozen=True)
class Outcome:
    """What GPTQ did to one matrix.

    loss, rtn_loss: Gram loss of the result and of round-to-nearest; kept_rtn: the result is
    round-to-nearest because its loss was lower (or because H couldn't be factorized, in which
    case ``damping`` is None).
    """

    tensor: QuantizedTensor
    loss: float
    rtn_loss: float
    kept_rtn: bool
    damping: float | None


@dataclass(frozen=True)
class Factor:
    """U with H⁻¹ = UᵀU, in visiting order, and that order. Shared by all readers of an input."""

    upper: Tensor
    order: Tensor
    damping: float


def factorize(gram: Tensor, settings: Settings) -> Factor | None:
    """Factorize one Gram matrix (in, in); None when no damping makes it positive definite."""
    diagonal = gram.diagonal()
    order = (
        torch.argsort(diagonal, descending=True, stable=True)
        if settings.activation_order
        else torch.arange(gram.shape[0], device=gram.device)
    )
    hessian = gram[order][:, order]
    mean = diagonal.mean().clamp(min=torch.finfo(gram.dtype).tiny)
    with _one_thread():
        for attempt in range(_RETRIES):
            damping = settings.damping * 10**attempt
            damped = hessian + torch.eye(len(order), device=gram.device) * (damping * mean)
            lower, failed = torch.linalg.cholesky_ex(damped)
            if failed:
                continue
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(upper.isfinite().all()):
                return Factor(upper, order, damping)
    return None


@contextmanager
def _one_thread() -> Iterator[None]:
    """LAPACK's factorizations round differently for every number of threads; with one, never."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def quantize(
    weight: Tensor, gram: Tensor, factor: Factor | None, grid: Grid, settings: Settings
) -> Outcome:
    """Quantize ``weight`` (out, in) under ``gram`` = XᵀX (in, in), both float32."""
    nearest = rtn.quantize(weight, grid)
    nearest_loss = total(gram_loss(nearest.dequantize() - weight, gram))
    if factor is None:
        return Outcome(nearest, nearest_loss, nearest_loss, kept_rtn=True, damping=None)
    groups = grouped(weight, grid)  # (out, groups, columns)
    if settings.clip_search:
        importance = gram.diagonal().view(groups.shape[1:])
        scale, zero = search_range(
            groups,
            grid,
            lambda error: (error.square_() * importance).sum(2),
            steps=_CLIP_STEPS,
            smallest=_SMALLEST_CLIP,
        )
    else:
        scale, zero = fit(groups.amin(2), groups.amax(2), grid)
    codes = _feedback(weight, scale, zero, factor, grid, settings.block_size)
    result = assemble(codes, scale, zero, grid)
    loss = total(gram_loss(result.dequantize() - weight, gram))
    if not loss <= nearest_loss:
        return Outcome(nearest, nearest_loss, nearest_loss, True, factor.damping)
    return Outcome(result, loss, nearest_loss, False, factor.damping)


def _feedback(
    weight: Tensor, scale: Tensor, zero: Tensor, factor: Factor, grid: Grid, block_size: int
) -> Tensor:
    """Codes (out, in) as float32, in stored order."""
    order, upper = factor.order, factor.upper
    # Transposed, so that a column is contiguous: (in, out), rows in visiting order.
    columns = grid.columns(weight.shape[1])
    work = weight.t()[order].contiguous()
    scales = scale.t()[order // columns]
    zeros = zero.t()[order // columns]
    codes = torch.empty_like(work)
    for start in range(0, len(order), block_size):
        end = min(start + block_size, len(order))
        errors = torch.empty_like(work[start:end])
        for j in range(start, end):
            code = encode(work[j], scales[j], zeros[j], grid)
            codes[j] = code
            error = (work[j] - (code - zeros[j]) * scales[j]) / upper[j, j]
            errors[j - start] = error
            work[j + 1 : end].addr_(upper[j, j + 1 : end], error, alpha=-1)
        work[end:].addmm_(upper[start:end, end:].t(), errors, alpha=-1)
    stored = torch.empty_like(codes)
    stored[order] = codes
    return stored.t().contiguous()
