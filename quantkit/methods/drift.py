"""Correction for drifted inputs: the quantized model reads Y where the unquantized one reads X.

Then the best weight isn't W but the one that comes closest to X Wᵀ from Y: W + C with
C = W (X - Y)ᵀ Y H⁻¹, where H = YᵀY + λI is the damped hessian. GPTAQ (Li et al., arXiv 2504.02692)
makes the correction column by column. Here error feedback rounds W + C / 2.

Error feedback works on (W + C - Ŵ) T, where T is triangular and H = T Tᵀ. So C itself isn't needed,
only C T = W (X - Y)ᵀ Y T⁻ᵀ, which takes one triangular solve.
"""

from __future__ import annotations

from torch import Tensor

# The share of C that is corrected. All of C is a little better on one model, and worse than half of
# it on another; half of it is better than none on both (docs/quality.md, "Drifted inputs").
_SHARE = 0.5


def correction(weight: Tensor, drift: Tensor, order: Tensor) -> Tensor:
    """Half of W (X - Y)ᵀ Y, (out, in) float32, with its columns in ``order``.

    weight: rows of W (out, in), of any float dtype; drift: (X - Y)ᵀ Y (in, in), in whose dtype the
    product is computed; order: (in,) int64.
    """
    return (weight.to(drift.dtype) @ drift).float().index_select(1, order).mul_(_SHARE)
