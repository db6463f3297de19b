"""Inputs that have drifted: the quantized model reads Y where the unquantized one reads X.

What is rounded then is not W but what comes closest to W X from Y, W + C with
C = W (X - Y)ᵀ Y H⁻¹ and H = YᵀY + λI: half of the way there (GPTAQ, Li et al., arXiv 2504.02692,
whose correction is made column by column, and in full). C itself is never needed. Error feedback
looks at (W + C - Ŵ) T, where H = T Tᵀ and T is triangular; and C T is W (X - Y)ᵀ Y T⁻ᵀ.
"""

from __future__ import annotations

from torch import Tensor

_SHARE = 0.5  # of the drift, that is made up for


def pull(weight: Tensor, drift: Tensor, order: Tensor) -> Tensor:
    """A share of W (X - Y)ᵀ Y, (out, in) float32, its columns in ``order`` (in).

    weight: rows of W (out, in), of any float dtype; drift: (X - Y)ᵀ Y (in, in), in whose dtype
    the product is taken.
    """
    return (weight.to(drift.dtype) @ drift).float().index_select(1, order).mul_(_SHARE)
