"""What engines do to the inputs of a linear that they compute in 8 bits.

Each token has a scale of its own, taken from the token itself (*dynamic*), so nothing of it is
stored; others also store one scale for all (*static*), which is then handed in. The scales are
those of vLLM's kernels (``dynamic_scaled_int8_quant``, ``dynamic_per_token_scaled_fp8_quant``);
compressed-tensors in transformers takes absmax / 127.5 for int8, and the same for FP8. The product
is exact in int32 or float32 there, so that rounding the inputs is all that judging must imitate.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from quantkit.methods import fp8

Rounding = Callable[[Tensor], Tensor]


def round_int8(inputs: Tensor, scale: Tensor | None = None) -> Tensor:
    """``inputs`` (…, features) as codes of -127 to 127 times each token's absmax / 127.

    With a static ``scale`` codes reach from -128 to 127.
    """
    values = inputs.float()
    if scale is not None:
        return (values / scale).round_().clamp_(-128, 127).mul_(scale).to(inputs.dtype)
    scale = (values.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    return (values / scale).round_().mul_(scale).to(inputs.dtype)


def round_fp8(inputs: Tensor, scale: Tensor | None = None) -> Tensor:
    """``inputs`` (…, features) as float8_e4m3fn times each token's absmax / 448, or a ``scale``."""
    values = inputs.float()
    if scale is None:
        scale = values.abs().amax(-1, keepdim=True) / fp8.LARGEST
        scale = scale.clamp(min=1 / (512 * fp8.LARGEST))
    return fp8.encode(values / scale).float().mul_(scale).to(inputs.dtype)
