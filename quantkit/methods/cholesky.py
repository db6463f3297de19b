"""The Cholesky factor of a Gram matrix, in its place."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from quantkit.base.parallel import one_thread, pool

_PANEL = 128  # columns; all but those on the diagonal is matrix products, which are the faster part
_SLAB = 512  # rows that one thread works on; fixed, so that bytes don't depend on the threads


def cholesky_(matrix: Tensor, threads: int = 1) -> bool:
    """Turn ``matrix`` (n, n), symmetric and positive definite, into L with L Lᵀ = ``matrix``.

    Left-looking and in place: no second matrix of that size is needed. The bytes are the same for
    any number of threads. Right of the diagonal are zeros.
    Returns False, the matrix spoilt, where it isn't positive definite or holds what isn't finite.
    """
    if matrix.device.type != "cpu":
        lower, failed = torch.linalg.cholesky_ex(matrix)
        matrix.copy_(lower)
        return not failed and bool(matrix.isfinite().all())
    with one_thread(), pool(threads) as workers:
        for first in range(0, len(matrix), _PANEL):
            last = min(first + _PANEL, len(matrix))
            done = matrix[first:last, :first]
            matrix[first:last, first:last].addmm_(done, done.t(), alpha=-1)
            corner, failed = torch.linalg.cholesky_ex(matrix[first:last, first:last])
            if failed:
                return False
            matrix[first:last, first:last] = corner
            slabs = matrix[last:, :last].split(_SLAB)
            list(workers.map(partial(_fill, done, corner), slabs))
        matrix.tril_()
        return bool(matrix.isfinite().all())


def _fill(done: Tensor, corner: Tensor, rows: Tensor) -> None:
    """Columns of L below ``corner``, the last of ``rows``; the others are those of L already."""
    left, below = rows.tensor_split([done.shape[1]], 1)
    below.addmm_(left, done.t(), alpha=-1)
    below.copy_(torch.linalg.solve_triangular(corner, below.t(), upper=False).t())
