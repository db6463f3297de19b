"""Statistics: second moments in any order, drift, and one measurement for all who read a tensor."""

from __future__ import annotations

import pytest
import torch

from quantkit.calibration.statistics import Diagonal, Drift, Gram, InputStatistics
from tests.helpers.measured_block import measured_block
from tests.helpers.tiny import Tiny


@pytest.mark.parametrize("width", [64, 256, 700])
def test_a_gram_matrix_comes_in_any_order(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    rows = torch.randn(300, width, generator=generator).bfloat16()
    moment = Gram(width, rows.device)
    moment.add(rows)
    whole, order = moment.matrix(), torch.randperm(width, generator=generator)
    assert torch.allclose(whole, rows.float().T @ rows.float(), rtol=1e-3, atol=1e-2)
    assert torch.equal(moment.matrix(order), whole[order][:, order])


def test_statistics_of_features_in_another_order() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, order = torch.randn(50, 32, generator=generator), torch.randperm(32, generator=generator)
    given, moved = (InputStatistics(["o"], 32, Gram(32, rows.device), 50) for _ in range(2))
    given.moment.add(rows)
    given.drift = torch.randn(32, 32, generator=generator)
    moved.moment.add(rows[:, order])
    reordered, further = given.reordered(order), torch.randperm(32, generator=generator)
    torch.testing.assert_close(reordered.importance(), moved.importance())
    torch.testing.assert_close(reordered.moment.matrix(), moved.moment.matrix())
    torch.testing.assert_close(reordered.moment.matrix(further), moved.moment.matrix(further))
    assert reordered.drift is not None
    assert torch.equal(reordered.drift, given.drift[order][:, order])


def test_a_diagonal_is_the_same_with_and_without_the_rest_of_the_matrix() -> None:
    rows = torch.randn(2000, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    gram, diagonal = Gram(96, rows.device), Diagonal(96, rows.device)
    gram.add(rows)
    diagonal.add(rows)
    assert torch.equal(gram.diagonal(), diagonal.diagonal())
    with pytest.raises(TypeError, match="diagonal"):
        diagonal.matrix()


def test_drift_is_the_product_of_difference_and_input() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(3000, 300, generator=generator)
    y = x + 0.1 * torch.randn(3000, 300, generator=generator)
    drift = Drift(300, x.device)
    drift.add(x, y)
    assert torch.allclose(drift.matrix().float(), (x - y).t() @ y, rtol=5e-3, atol=0.2)


def test_linears_that_read_one_tensor_share_one_gram_matrix(tiny: Tiny) -> None:
    inputs = measured_block(tiny("llama")).inputs
    assert [group.consumers for group in inputs] == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]
    for group in inputs:
        assert group.tokens == 8 * 32
        assert set(group.energy) == set(group.consumers)
        gram = group.moment.matrix()
        assert torch.allclose(gram, gram.t(), rtol=1e-4, atol=1e-3)
        assert torch.allclose(gram.diagonal(), group.moment.diagonal(), rtol=1e-4)
