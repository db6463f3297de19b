"""Inputs that have drifted: the quantized model reads Y where the unquantized one reads X.

Then it isn't W that is rounded but the weight which comes closest to X Wᵀ from Y, W + C with
C = W (X - Y)ᵀ Y H⁻¹ and H = YᵀY + λI: half of C is added (GPTAQ, Li et al., arXiv 2504.02692,
makes the correction column by column, and in full). C itself is never needed: error feedback
looks at (W + C - Ŵ) T, where H = T Tᵀ and T is triangular, and C T is W (X - Y)ᵀ Y T⁻ᵀ.
"""

from __future__ import annotations

from torch import Tensor

_SHARE = 0.5  # of the drift that is corrected


def correction(weight: Tensor, drift: Tensor, order: Tensor) -> Tensor:
    """The corrected share of W (X - Y)ᵀ Y, (out, in) float32, its columns in ``order`` (in).

    weight: rows of W (out, in), of any float dtype; drift: (X - Y)ᵀ Y (in, in), in whose dtype
    the product is computed.
    """
    return (weight.to(drift.dtype) @ drift).float().index_select(1, order).mul_(_SHARE)
