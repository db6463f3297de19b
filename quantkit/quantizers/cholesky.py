"""The Cholesky factor of a Gram matrix, in its place."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.parallel import one_thread

_PANEL = 128  # columns; all but those on the diagonal is matrix products, which are the faster part


def cholesky_(matrix: Tensor) -> bool:
    """Turn ``matrix`` (n, n), symmetric and positive definite, into L with L Lᵀ = ``matrix``.

    Left-looking and in place: no second matrix of that size is needed. Computes on one thread,
    so that the bytes are the same for any number of them. Right of the diagonal are zeros.
    Returns False, the matrix spoilt, where it isn't positive definite or holds what isn't finite.
    """
    if matrix.device.type != "cpu":
        lower, failed = torch.linalg.cholesky_ex(matrix)
        matrix.copy_(lower)
        return not failed and bool(matrix.isfinite().all())
    with one_thread():
        for first in range(0, len(matrix), _PANEL):
            last = first + _PANEL
            panel = matrix[first:, first:last]
            if first:
                panel.addmm_(matrix[first:, :first], matrix[first:last, :first].t(), alpha=-1)
            corner, failed = torch.linalg.cholesky_ex(panel[:_PANEL])
            if failed:
                return False
            panel[:_PANEL] = corner
            below = panel[_PANEL:]
            below.copy_(torch.linalg.solve_triangular(corner, below.t(), upper=False).t())
        matrix.tril_()
        return bool(matrix.isfinite().all())
