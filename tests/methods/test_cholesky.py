"""The factorization in place equals torch's, and refuses what isn't positive definite."""

from __future__ import annotations

import pytest
import torch

from quantkit.methods.cholesky import cholesky_


@pytest.mark.parametrize("width", [1, 96, 128, 300, 1300])
def test_cholesky_in_place_is_the_factor(width: int) -> None:
    rows = torch.randn(2 * width, width, generator=torch.Generator().manual_seed(width))
    gram = rows.T @ rows + torch.eye(width)
    factor = gram.clone()
    assert cholesky_(factor)
    expected = torch.linalg.cholesky(gram.double())
    assert torch.allclose(factor.double(), expected, rtol=1e-4, atol=1e-4)
    assert factor.triu(1).count_nonzero() == 0
    again = gram.clone()
    assert cholesky_(again, threads=3) and torch.equal(again, factor)


@pytest.mark.parametrize("spoil", [-1.0, torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 299])
def test_cholesky_refuses_what_is_not_positive_definite(spoil: float, place: int) -> None:
    matrix = torch.eye(300)
    matrix[place, place] = spoil
    assert not cholesky_(matrix)
