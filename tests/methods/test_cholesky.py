"""The Cholesky factor in place equals torch's; matrices that have none are refused."""

from __future__ import annotations

import pytest
import torch

from quantkit.methods.cholesky import cholesky_, on_device_


@pytest.mark.parametrize("width", [1, 96, 128, 300, 1300])
def test_it_is_the_factor_for_any_number_of_threads(width: int) -> None:
    rows = torch.randn(2 * width, width, generator=torch.Generator().manual_seed(width))
    gram = rows.T @ rows + torch.eye(width)
    factor = gram.clone()
    assert cholesky_(factor)
    expected = torch.linalg.cholesky(gram.double())
    assert torch.allclose(factor.double(), expected, rtol=1e-4, atol=1e-4)
    assert factor.triu(1).count_nonzero() == 0
    by_torch = gram.clone()
    assert on_device_(by_torch) and by_torch.triu(1).count_nonzero() == 0
    assert torch.allclose(by_torch.double(), expected, rtol=1e-4, atol=1e-4)
    again = gram.clone()
    assert cholesky_(again, threads=3) and torch.equal(again, factor)


@pytest.mark.parametrize("value", [-1.0, torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 299])
def test_a_matrix_that_is_not_positive_definite_is_refused(value: float, place: int) -> None:
    matrix = torch.eye(300)
    matrix[place, place] = value
    assert not on_device_(matrix.clone())
    assert not cholesky_(matrix)
