"""GPTQ's Gram loss is at most round-to-nearest's, whatever the Gram matrix."""

from __future__ import annotations

import pytest
import torch

from quantkit.quantizers import gptq, rtn
from quantkit.quantizers.gptq import Settings, factorize, quantize
from quantkit.quantizers.grid import Grid, gram_loss


def problem(tokens: int = 512, columns: int = 128, rows: int = 48):
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(tokens, columns, generator=generator) @ mixing
    x[:, 7] *= 12
    return torch.randn(rows, columns, generator=generator) * 0.05, x.t() @ x


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", [True, False])
def test_loss_is_at_most_round_to_nearests(bits, symmetric, order):
    w, gram = problem()
    settings = Settings(activation_order=order)
    outcome = quantize(w, gram, factorize(gram, settings), Grid(bits, 32, symmetric), settings)
    assert outcome.loss <= outcome.rtn_loss
    assert not outcome.kept_rtn and outcome.loss < 0.8 * outcome.rtn_loss
    actual = gram_loss(outcome.tensor.dequantize() - w, gram).sum().item()
    assert outcome.loss == pytest.approx(actual)


def test_blocked_updates_change_nothing():
    w, gram = problem()
    grid = Grid(4, 32, True)
    codes = [
        quantize(w, gram, factorize(gram, s), grid, s).tensor.codes
        for s in (Settings(block_size=128), Settings(block_size=16), Settings(block_size=1))
    ]
    # The same sums in another order: a code on the edge may fall to the other side.
    for other in codes[1:]:
        assert (codes[0] != other).float().mean() < 0.01


def test_feedback_follows_the_papers_recurrence():
    """Against the plain form: one column at a time, H⁻¹ recomputed by elimination."""
    w, gram = problem(rows=6, columns=24)
    grid, settings = Grid(4, -1, True), Settings(activation_order=False, clip_search=False)
    damped = gram.double() + torch.eye(24) * 0.01 * gram.diagonal().mean()
    inverse = torch.linalg.inv(damped)
    work = w.double().clone()
    nearest = rtn.quantize(w, grid)
    scale, zero = nearest.scales[:, 0].double(), nearest.zeros[:, 0].double()
    expected = torch.empty_like(work)
    for j in range(24):
        expected[:, j] = (work[:, j] / scale).round().add(zero).clamp(0, 15)
        error = (work[:, j] - (expected[:, j] - zero) * scale) / inverse[j, j]
        work -= error[:, None] * inverse[j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, :] = inverse[:, j] = 0
        inverse[j, j] = 1  # never used again
    outcome = quantize(w, gram, factorize(gram, settings), grid, settings)
    assert (outcome.tensor.codes == expected.to(torch.uint8)).float().mean() > 0.97


def test_inputs_that_are_always_zero_are_harmless():
    w, gram = problem()
    gram[10:20] = gram[:, 10:20] = 0
    settings = Settings()
    outcome = quantize(w, gram, factorize(gram, settings), Grid(4, 32, False), settings)
    assert outcome.tensor.dequantize().isfinite().all()
    assert outcome.loss <= outcome.rtn_loss


def test_damping_is_raised_until_it_factorizes_and_not_for_ever():
    _, gram = problem()
    indefinite = gram - 0.05 * gram.diagonal().mean() * torch.eye(len(gram))
    factor = factorize(indefinite, Settings())
    assert factor is not None and factor.damping > 0.01
    assert factorize(-gram, Settings()) is None
    assert factorize(torch.full_like(gram, torch.nan), Settings()) is None


def test_without_a_factor_the_nearest_codes_are_kept_and_it_is_said():
    w, gram = problem()
    outcome = quantize(w, gram, None, Grid(4, 32, True), Settings())
    assert outcome.kept_rtn and outcome.damping is None
    assert torch.equal(outcome.tensor.codes, rtn.quantize(w, Grid(4, 32, True)).codes)


def test_nearest_codes_are_kept_where_feedback_does_worse(monkeypatch):
    w, gram = problem()
    monkeypatch.setattr(gptq, "_feedback", lambda weight, *_: torch.zeros_like(weight))
    outcome = quantize(w, gram, factorize(gram, Settings()), Grid(4, 32, True), Settings())
    assert outcome.kept_rtn and outcome.loss == outcome.rtn_loss
