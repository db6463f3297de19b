"""GPTQ: its loss is far below round-to-nearest's, and is the one that it reports."""

from __future__ import annotations

import pytest
import torch

from quantkit.calibration.statistics import Drift
from quantkit.methods import rtn
from quantkit.methods.gptq import method as gptq
from quantkit.methods.gptq.feedback import GptqSettings, RoundedRows, factorize, quantize_rows
from quantkit.methods.gptq.method import Readers
from quantkit.methods.grids import Grid, QuantizedTensor, gram_loss
from tests.helpers.moments import Known


def problem(
    tokens: int = 512, columns: int = 128, rows: int = 48
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(tokens, columns, generator=generator) @ mixing
    x[:, 7] *= 12
    return torch.randn(rows, columns, generator=generator) * 0.05, x.t() @ x


def quantize(
    w: torch.Tensor, gram: torch.Tensor, grid: Grid, settings: GptqSettings
) -> RoundedRows:
    return gptq.quantize_readers([Readers(Known(gram), [w], [grid])], settings)[0][0]


def loss_of(tensor: QuantizedTensor, w: torch.Tensor, gram: torch.Tensor) -> float:
    return gram_loss(tensor.dequantize() - w, gram).sum().item()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", [True, False])
def test_loss_is_below_round_to_nearests(bits: int, symmetric: bool, order: bool) -> None:
    w, gram = problem()
    grid = Grid(bits, 32, symmetric)
    rounded = quantize(w, gram, grid, GptqSettings(activation_order=order))
    assert rounded.loss < 0.8 * loss_of(rtn.quantize(w, grid), w, gram)
    assert rounded.loss == pytest.approx(loss_of(rounded.tensor, w, gram), rel=1e-3)


def test_linears_that_read_one_input_are_quantized_as_if_alone() -> None:
    w, gram = problem(rows=80)
    grids = [Grid(4, 32, True), Grid(3, 32, False), Grid(4, 32, True)]
    parts = w.split([16, 40, 24])
    together = gptq.quantize_readers([Readers(Known(gram), parts, grids)], GptqSettings())[0]
    for part, grid, rounded in zip(parts, grids, together, strict=True):
        alone = quantize(part, gram, grid, GptqSettings())
        assert rounded.tensor.grid == grid
        # Products of other heights may be rounded otherwise, which moves codes on an edge.
        assert (rounded.tensor.codes != alone.tensor.codes).float().mean() < 0.01
        assert torch.equal(rounded.tensor.scales, alone.tensor.scales)


def test_the_block_size_changes_nothing() -> None:
    w, gram = problem()
    grid = Grid(4, 32, True)
    codes = [
        quantize(w, gram, grid, s).tensor.codes
        for s in (
            GptqSettings(block_size=128),
            GptqSettings(block_size=16),
            GptqSettings(block_size=1),
        )
    ]
    # The same sums in another order may be rounded otherwise, which moves codes on an edge.
    for other in codes[1:]:
        assert (codes[0] != other).float().mean() < 0.01


def test_feedback_follows_the_papers_recurrence() -> None:
    """Against the plain form: one column at a time, H⁻¹ recomputed by elimination."""
    w, gram = problem(rows=6, columns=24)
    grid, settings = Grid(4, -1, True), GptqSettings(activation_order=False, clip_search=False)
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
    rounded = quantize(w, gram, grid, settings)
    assert (rounded.tensor.codes == expected.to(torch.uint8)).float().mean() > 0.97


def test_inputs_that_are_always_zero_are_harmless() -> None:
    w, gram = problem()
    gram[10:20] = gram[:, 10:20] = 0
    grid = Grid(4, 32, False)
    rounded = quantize(w, gram, grid, GptqSettings())
    assert rounded.tensor.dequantize().isfinite().all()
    assert rounded.loss < loss_of(rtn.quantize(w, grid), w, gram)


def test_damping_grows_until_the_hessian_has_a_factor_or_ends() -> None:
    _, gram = problem()
    indefinite = gram - 0.05 * gram.diagonal().mean() * torch.eye(len(gram))
    factor = factorize(Known(indefinite), GptqSettings())
    assert factor is not None and factor.damping > 0.01
    assert factorize(Known(-gram), GptqSettings()) is None
    assert factorize(Known(torch.full_like(gram, torch.nan)), GptqSettings()) is None


def test_without_a_factor_the_codes_are_the_nearest_and_no_damping_is_reported() -> None:
    w, gram = problem()
    grid = Grid(4, 32, True)
    rounded = quantize(w, -gram, grid, GptqSettings())
    assert rounded.damping is None
    assert torch.equal(rounded.tensor.codes, rtn.quantize(w, grid).codes)


@pytest.mark.parametrize("rows", [1, 48])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_chosen_late_lose_less_at_few_bits(rows: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1024, 256, generator=generator)
    x = x @ (torch.eye(256) + torch.randn(256, 256, generator=generator) / 16)
    moment = Known(x.T @ x)
    w = torch.randn(rows, 256, generator=generator) * 0.05
    grid = Grid(3, 32, symmetric)
    late = factorize(moment, GptqSettings(), group=32)
    early = factorize(moment, GptqSettings())
    assert late is not None and early is not None
    assert (late.group, early.group) == (32, None)
    results = [quantize_rows(w, factor, grid, GptqSettings()) for factor in (late, early)]
    for rounded in results:
        expected = gram_loss(rounded.tensor.dequantize() - w, moment.gram)
        assert torch.allclose(rounded.losses, expected, rtol=1e-2)
    if rows > 1:
        assert results[0].loss < 0.97 * results[1].loss


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_half_of_the_drift_is_corrected(bits: int) -> None:
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(128, 128, generator=generator) / 128**0.5
    x = torch.randn(1024, 128, generator=generator) @ mixing
    y = x + 0.1 * x.roll(1, 1) + 0.02 * torch.randn(1024, 128, generator=generator)
    w = torch.randn(96, 128, generator=generator) * 0.05
    grid, moment, drift = Grid(bits, 32, False), Known(y.t() @ y), Drift(128, x.device)
    drift.add(x, y)

    def error(value: torch.Tensor) -> float:
        return (x @ w.t() - y @ value.t()).square().sum().item()

    [[plain]] = gptq.quantize_readers([Readers(moment, [w], [grid])], GptqSettings())
    [[corrected]] = gptq.quantize_readers(
        [Readers(moment, [w], [grid], drift.matrix())], GptqSettings()
    )
    assert error(corrected.tensor.dequantize()) < 0.8 * error(plain.tensor.dequantize())
    # With many bits, the codes are those of weights half of the way to the best ones, unless these
    # are outside of the range, which is chosen for the uncorrected weights.
    hessian = y.t() @ y
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    change = torch.linalg.solve(hessian, w @ (x - y).t() @ y, left=False)
    distance = (corrected.tensor.dequantize() - (w + change / 2)).norm() / change.norm()
    assert bits < 8 or distance < 0.2
