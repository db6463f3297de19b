"""The Cholesky factorization of a damped Gram matrix, in place."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from quantkit.base.parallel import one_thread, pool

_PANEL = 128  # columns factorized together; what is left is matrix products, which are faster
_SLAB = 512  # rows that one thread computes; fixed, so that the bytes don't depend on the threads


def cholesky_(matrix: Tensor, threads: int = 1) -> Tensor:
    """Overwrite ``matrix`` (n, n), symmetric and positive definite, by its factor L.

    L is lower triangular, with L Lᵀ = ``matrix``, and the same to the last bit for any number of
    ``threads``. Returns a bool scalar on the matrix's device, so that a GPU needn't be waited for:
    False, with the matrix destroyed, where it isn't positive definite or holds NaN or infinity.
    """
    if matrix.device.type != "cpu":
        return on_device_(matrix)
    # Left-looking: a panel is made from the ones before it and is then final, so that beside the
    # matrix only a panel's products are in memory. torch's own factorization needs a second matrix,
    # and rounds otherwise for every number of threads: each product here is one thread's work.
    with one_thread(), pool(threads) as workers:
        for first in range(0, len(matrix), _PANEL):
            last = min(first + _PANEL, len(matrix))
            left = matrix[first:last, :first]
            matrix[first:last, first:last].addmm_(left, left.t(), alpha=-1)
            corner, failed = torch.linalg.cholesky_ex(matrix[first:last, first:last])
            if failed:
                return torch.tensor(False)
            matrix[first:last, first:last] = corner
            slabs = matrix[last:, :last].split(_SLAB)
            list(workers.map(partial(_fill_panel, left, corner), slabs))
        matrix.tril_()
        return matrix.isfinite().all()


def on_device_(matrix: Tensor) -> Tensor:
    """The same by torch's own factorization: a GPU has no threads that could change the bytes."""
    # The upper factor of the transposed view is written in place, and is L seen from here. torch
    # would make a second matrix for the lower one, which is column by column in memory.
    view = matrix.mT
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(view, upper=True, out=(view, failed))
    return (failed == 0) & matrix.isfinite().all()


def _fill_panel(left: Tensor, corner: Tensor, rows: Tensor) -> None:
    """Compute the panel's columns of L in ``rows``, which are below its ``corner``.

    left: L in the corner's rows, left of the corner; rows: L up to the panel, whose columns are the
    last ones and still hold the matrix.
    """
    before, panel = rows.tensor_split([left.shape[1]], 1)
    panel.addmm_(before, left.t(), alpha=-1)
    panel.copy_(torch.linalg.solve_triangular(corner, panel.t(), upper=False).t())
