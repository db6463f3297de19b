"""Sums over the inputs of linears."""

from __future__ import annotations

import pytest
import torch

from quantkit.calibration.statistics import Gram


@pytest.mark.parametrize("width", [64, 256, 700])
def test_a_gram_matrix_is_given_in_any_order(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    rows = torch.randn(300, width, generator=generator).bfloat16()
    moment = Gram(width, rows.device)
    moment.add(rows)
    whole, order = moment.matrix(), torch.randperm(width, generator=generator)
    assert torch.allclose(whole, rows.float().T @ rows.float(), rtol=1e-3, atol=1e-2)
    assert torch.equal(moment.matrix(order), whole[order][:, order])
