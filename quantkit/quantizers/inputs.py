"""What engines do to the inputs of a linear that they compute in 8 bits.

Each token has a scale of its own, taken from the token itself (*dynamic*), so nothing of it is
stored. The scales are those of vLLM's kernels (``dynamic_scaled_int8_quant``,
``dynamic_per_token_scaled_fp8_quant``); compressed-tensors in transformers takes absmax / 127.5
for int8, and the same for FP8. The product is exact in int32 or float32 there, so that
rounding the inputs is all that judging must imitate.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from quantkit.quantizers import fp8

Rounding = Callable[[Tensor], Tensor]


def round_int8(inputs: Tensor) -> Tensor:
    """``inputs`` (…, features) as codes of -127 to 127 times each token's absmax / 127."""
    values = inputs.float()
    scale = (values.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    return (values / scale).round_().mul_(scale).to(inputs.dtype)


def round_fp8(inputs: Tensor) -> Tensor:
    """``inputs`` (…, features) as float8_e4m3fn times each token's absmax / 448."""
    values = inputs.float()
    scale = values.abs().amax(-1, keepdim=True) / fp8.LARGEST
    scale = scale.clamp(min=1 / (512 * fp8.LARGEST))
    return fp8.encode(values / scale).float().mul_(scale).to(inputs.dtype)
