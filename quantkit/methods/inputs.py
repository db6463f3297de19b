"""How engines round the inputs of a linear that they compute in 8 bits.

Mostly each token is rounded by a scale of its own, made from the token itself (*dynamic*), so that
no scale is stored. Some checkpoints of other tools store one scale for all tokens (*static*).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from quantkit.methods import fp8

# The scales are those of vLLM's kernels (``dynamic_scaled_int8_quant``,
# ``dynamic_per_token_scaled_fp8_quant``). compressed-tensors in transformers divides by 127.5 for
# int8, and does the same for FP8. Engines then multiply exactly, in int32 or float32: rounding the
# inputs is all that judging must imitate.
InputRounding = Callable[[Tensor], Tensor]


def round_int8(inputs: Tensor, scale: Tensor | None = None) -> Tensor:
    """``inputs`` (…, features), of any float dtype, rounded to int8.

    Each token is rounded to multiples, of -127 to 127, of its absmax / 127; with a static
    ``scale`` to multiples of that, of -128 to 127. The result is of the dtype of ``inputs``.
    """
    values = inputs.float()
    if scale is not None:
        return (values / scale).round_().clamp_(-128, 127).mul_(scale).to(inputs.dtype)
    scale = (values.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    return (values / scale).round_().mul_(scale).to(inputs.dtype)


def round_fp8(inputs: Tensor, scale: Tensor | None = None) -> Tensor:
    """``inputs`` (…, features), of any float dtype, rounded to float8_e4m3fn.

    Each token is scaled by its absmax / 448, or by a static ``scale``. The result is of the dtype
    of ``inputs``.
    """
    values = inputs.float()
    if scale is None:
        scale = values.abs().amax(-1, keepdim=True) / fp8.LARGEST
        # The smallest scale of vLLM's kernel.
        scale = scale.clamp(min=1 / (512 * fp8.LARGEST))
    return fp8.nearest_fp8(values / scale).float().mul_(scale).to(inputs.dtype)
