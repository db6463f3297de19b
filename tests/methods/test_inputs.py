"""Inputs of linears, rounded to int8 and FP8 as engines do it."""

from __future__ import annotations

import torch

from quantkit.methods.inputs import round_fp8, round_int8


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_each_token_is_rounded_on_its_own() -> None:
    x = random(3, 5, 64) * torch.tensor([1e-3, 1, 50])[:, None, None]
    largest = x.abs().amax(-1, keepdim=True)
    assert ((round_int8(x) - x).abs() <= largest / 254 * 1.001).all()
    # Three bits of mantissa, and subnormal steps of 2^-9 in units of absmax / 448.
    assert ((round_fp8(x) - x).abs() <= (x.abs() / 16).clamp(min=largest / 448 / 1024)).all()
    for rounding in (round_int8, round_fp8):
        assert torch.equal(rounding(x)[1], rounding(x[1]))
        assert torch.equal(rounding(torch.zeros(2, 8)), torch.zeros(2, 8))
        assert rounding(x.bfloat16()).dtype == torch.bfloat16
