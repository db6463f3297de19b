"""Error feedback on ggml's grids: a loss far below ggml's own, exact packing, the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit.base.errors import InputError
from quantkit.base.progress import Silent
from quantkit.commands.quantize import prepare
from quantkit.commands.quantize import quantize as make
from quantkit.methods.ggml import feedback
from quantkit.methods.ggml.blocks import LAYOUTS, Blocks, decoded
from quantkit.methods.ggml.encoder import quantize_by_ggml
from quantkit.methods.ggml.feedback import (
    FEEDBACK_TYPES,
    Factorization,
    factorize_orders,
    quantize_with_feedback,
)
from quantkit.methods.ggml.scales import CodeRounding, Scales
from quantkit.methods.ggml.types import GgmlTensor, available, row_bytes
from quantkit.methods.grids import gram_loss
from quantkit.recipes.recipe import load_recipe
from tests.helpers.gguf_tiny import TEXT, checkpoint
from tests.helpers.moments import Known

pytest.importorskip("gguf")
native = pytest.mark.skipif(
    "Q4_K" not in available(), reason="llama.cpp's library (xllamacpp) is not installed"
)


def gram_of(columns: int, *, heavy: bool = False) -> Tensor:
    """XᵀX of correlated inputs of uneven energy; ``heavy``: a few of them have most of it."""
    generator = torch.Generator().manual_seed(columns)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    mixing += torch.eye(columns)
    energy = torch.rand(columns, generator=generator) + 0.5
    if heavy:
        energy[torch.randperm(columns, generator=generator)[: columns // 20]] *= 8
    x = torch.randn(2 * columns, columns, generator=generator) @ mixing * energy
    return x.t() @ x


def weight_of(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.03


def factor_of(gram: Tensor) -> Factorization:
    factor = factorize_orders(Known(gram))
    assert factor is not None
    return factor


def loss(weight: Tensor, quantized: GgmlTensor, gram: Tensor) -> float:
    return float(gram_loss(quantized.dequantize() - weight, gram).double().sum())


def integers(limits: tuple[int, int], *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(limits[0], limits[1] + 1, shape, generator=generator)


def halves(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return (torch.randn(shape, generator=generator) / 100).half().float()


@pytest.mark.parametrize("type", FEEDBACK_TYPES)
def test_decoders_read_the_packed_blocks_exactly(type: str) -> None:
    layout, rows, columns = LAYOUTS[type], 9, 768
    blocks, groups = columns // layout.columns, columns // layout.group
    codes = integers((0, 15) if layout.table else layout.codes, rows, columns)
    scales, mins = integers(layout.scales, rows, groups), integers(layout.mins, rows, groups)
    d, dmin = halves(rows, blocks), halves(rows, blocks + 1)[:, 1:]
    packed = Blocks(type, codes, d, scales, dmin, mins).pack()
    q = torch.tensor(layout.table)[codes] if layout.table else codes

    def per_column(unit: Tensor, integer: Tensor) -> Tensor:
        wide = unit.repeat_interleave(groups // blocks, 1) * integer
        return wide.repeat_interleave(layout.group, 1)

    expected = per_column(d, scales) * q
    if layout.has_min:
        expected -= per_column(dmin, mins)
    assert packed.blocks.shape == (rows, row_bytes(type, columns))
    assert torch.equal(packed.dequantize(), expected)
    assert torch.equal(decoded(packed, torch.device("cpu")), expected)


@native
@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("type", FEEDBACK_TYPES)
def test_the_reported_loss_is_exact_and_far_below_ggmls_own(type: str, heavy: bool) -> None:
    weight, gram = weight_of(80, 512), gram_of(512, heavy=heavy)
    factor = factor_of(gram)
    assert (factor.free is not None) is heavy
    rounded = quantize_with_feedback(weight, factor, type)
    assert torch.equal(
        quantize_with_feedback(weight.bfloat16(), factor, type).tensor.blocks,
        quantize_with_feedback(weight.bfloat16().float(), factor, type).tensor.blocks,
    )
    assert rounded.tensor.type == type and rounded.tensor.shape == weight.shape
    assert rounded.loss == pytest.approx(loss(weight, rounded.tensor, gram), rel=1e-3)
    own = quantize_by_ggml(weight, type, gram.diagonal())
    assert rounded.loss < 0.6 * loss(weight, own, gram)


@pytest.mark.parametrize("type", FEEDBACK_TYPES)
def test_uncorrelated_inputs_leave_nothing_to_feed_back(type: str) -> None:
    """Then each code is the nearest to its weight, whatever the order of visits."""
    weight = weight_of(16, 256)
    result = quantize_with_feedback(weight, factor_of(torch.eye(256)), type).tensor.dequantize()
    steps = {"Q2_K": 3, "Q3_K": 7, "Q8_0": 254}.get(type, 15)
    spread = (weight.amax(1) - weight.amin(1)).max()
    assert (result - weight).abs().max() < spread / steps


@pytest.mark.parametrize("type", ["Q3_K", "Q4_K", "IQ4_NL"])
@pytest.mark.parametrize("reach", [16, 512])
def test_feedback_needs_the_correlations(type: str, reach: int) -> None:
    """Of neighbors in a group (16 columns), and of columns far apart (512)."""
    generator = torch.Generator().manual_seed(4)
    common = torch.randn(1024, 512 // reach, generator=generator).repeat_interleave(reach, 1)
    x = torch.randn(1024, 512, generator=generator) + 2 * common
    weight, gram = weight_of(64, 512), x.t() @ x
    blind = factor_of(torch.diag(gram.diagonal()))
    without = loss(weight, quantize_with_feedback(weight, blind, type).tensor, gram)
    assert quantize_with_feedback(weight, factor_of(gram), type).loss < 0.5 * without


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_half_of_the_drift_is_corrected(heavy: bool, exact: bool) -> None:
    """With eight bits, the result is close to the weights half of the way to the best ones."""
    weight, gram = weight_of(32, 256), gram_of(256, heavy=heavy)
    mixing = torch.randn(256, 256, generator=torch.Generator().manual_seed(3)) / 256
    drift = 4 * mixing @ gram  # of X = Y plus a mixture of Y
    factor = factorize_orders(Known(gram), drift=drift if exact else drift.bfloat16())
    assert factor is not None and (factor.free is not None) is heavy
    rounded = quantize_with_feedback(weight, factor, "Q8_0")
    hessian = gram.double()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    best = torch.linalg.solve(hessian, weight.double() @ drift.double(), left=False)
    change = rounded.tensor.dequantize().double() - weight
    assert (change - best / 2).norm() < 0.25 * best.norm() / 2
    assert rounded.loss == pytest.approx(
        loss((weight + best / 2).float(), rounded.tensor, hessian.float()),
        rel=0.02 if exact else 0.2,
    )


def test_the_second_round_follows_the_recurrence() -> None:
    """Its scales are the stored ones, so that its codes can be derived again, column by column."""
    weight, gram = weight_of(24, 256), gram_of(256, heavy=True)
    factor = factor_of(gram)
    assert factor.free is not None
    tensor = quantize_with_feedback(weight, factor, "Q4_0").tensor
    scales = (
        tensor.blocks.view(24, 8, 18)[..., :2].contiguous().view(torch.float16).double()[..., 0]
    )
    order = factor.free.columns
    assert torch.equal(order, gram.diagonal().argsort(descending=True, stable=True))
    reverse = order.flip(0)
    damped = gram.double()[reverse][:, reverse]
    damped += 0.01 * gram.diagonal().double().mean() * torch.eye(256)
    v = torch.linalg.cholesky(damped).flip(0, 1)
    assert torch.allclose(v @ v.t(), damped.flip(0, 1))
    expected, difference = torch.zeros(24, 256).double(), torch.zeros(24, 256).double()
    for k, column in enumerate(order.tolist()):
        target = weight[:, column] + difference @ v[:, k] / v[k, k]
        scale = scales[:, column // 32]
        expected[:, column] = (target / scale).round().clamp(-8, 7) * scale
        difference[:, k] = weight[:, column] - expected[:, column]
    same = (tensor.dequantize() - expected).abs() < 1e-6
    assert same.float().mean() > 0.97


@pytest.mark.parametrize("type", ["Q2_K", "Q3_K", "Q4_1", "Q6_K", "IQ4_XS"])
def test_fitting_scales_again_never_raises_the_loss(type: str) -> None:
    layout, weight = LAYOUTS[type], weight_of(200, 256)
    rounding = CodeRounding(type, weight.device)
    scales, group = Scales(type, weight, rounding), torch.tensor([3])
    upper = torch.linalg.cholesky(gram_of(layout.group)).t()
    targets = weight.t()[3 * layout.group :][: layout.group].clone()
    scales.choose(group, targets, upper.diagonal().square())
    q = rounding(((targets + scales.minimum(group)) / scales.step(group)).contiguous())

    def cost() -> Tensor:
        error = q * scales.step(group) - scales.minimum(group) - targets
        return (upper.t() @ error).square().sum(0)

    before = cost()
    scales.refit(group, q, targets, upper)
    assert (cost() <= before * (1 + 1e-4)).all()
    assert cost().sum() < 0.995 * before.sum()


def test_a_second_round_lowers_the_loss_where_few_inputs_have_most_of_the_energy() -> None:
    weight, gram = weight_of(64, 512), gram_of(512, heavy=True)
    both = factor_of(gram)
    one = Factorization(both.grouped, None, both.mean, both.damping)
    assert (
        quantize_with_feedback(weight, both, "Q4_K").loss
        < quantize_with_feedback(weight, one, "Q4_K").loss
    )


@pytest.mark.parametrize("type", ["Q2_K", "Q6_K", "Q4_0", "IQ4_XS"])
def test_threads_do_not_change_a_byte(type: str) -> None:
    weight, gram = weight_of(900, 768), gram_of(768, heavy=True)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(quantize_with_feedback(weight, factor_of(gram), type))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0].tensor.blocks, results[1].tensor.blocks)
    assert results[0].loss == results[1].loss


def test_rows_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, factor = weight_of(96, 512), factor_of(gram_of(512))
    whole = quantize_with_feedback(weight, factor, "Q3_K")
    monkeypatch.setattr(feedback, "ROWS_AT_ONCE", 32)
    parts = quantize_with_feedback(weight, factor, "Q3_K")
    # Products of other shapes may be rounded otherwise, which moves codes on an edge.
    assert (whole.tensor.blocks != parts.tensor.blocks).float().mean() < 0.01
    assert whole.loss == pytest.approx(parts.loss, rel=0.01)


@pytest.mark.parametrize("type", FEEDBACK_TYPES)
def test_extreme_weights_are_rounded_as_well_as_their_block_can(type: str) -> None:
    weight, gram = weight_of(8, 512), gram_of(512)
    weight[0] = 0
    weight[1, :256] = 0
    weight[2] = weight[2].abs()
    weight[3] = -weight[3].abs()
    weight[4] *= 1e-9  # below the range of fp16 scales
    weight[5, 300] = 1e7  # above
    weight[6], weight[7] = 0.02, -0.02
    result = quantize_with_feedback(weight, factor_of(gram), type).tensor.dequantize()
    assert result.isfinite().all()
    assert not result[0].any()
    for row in (1, 2, 3, 6, 7):
        difference, whole = (result - weight)[row, None], weight[row, None]
        assert gram_loss(difference, gram) < 0.1 * gram_loss(whole, gram)


def test_inputs_that_are_always_zero_are_harmless() -> None:
    weight, gram = weight_of(32, 512), gram_of(512)
    gram[100:140] = gram[:, 100:140] = 0
    rounded = quantize_with_feedback(weight, factor_of(gram), "Q4_K")
    assert rounded.loss == pytest.approx(loss(weight, rounded.tensor, gram), rel=1e-3)
    difference = (rounded.tensor.dequantize() - weight)[:, 100:140].square().sum()
    assert difference < 0.05 * weight[:, 100:140].square().sum()


def test_damping_grows_until_the_hessian_has_a_factor_or_ends() -> None:
    gram = gram_of(512)
    indefinite = gram - 1.1 * torch.linalg.eigvalsh(gram)[0] * torch.eye(512)
    indefinite -= 0.05 * gram.diagonal().mean() * torch.eye(512)
    assert factor_of(gram).damping == 0.01
    assert factor_of(indefinite).damping > 0.01
    for hopeless in (-gram, torch.zeros(512, 512), torch.full((512, 512), torch.nan)):
        assert factorize_orders(Known(hopeless)) is None


def test_what_can_not_be_quantized_is_refused() -> None:
    weight, factor = weight_of(8, 320), factor_of(gram_of(320))
    with pytest.raises(InputError, match="IQ3_S can't be quantized with error feedback") as caught:
        quantize_with_feedback(weight, factor, "IQ3_S")
    assert caught.value.fix is not None and "Q4_K" in caught.value.fix
    with pytest.raises(InputError, match="blocks of 256"):
        quantize_with_feedback(weight, factor, "Q4_K")
    with pytest.raises(InputError, match="the 320 measured input features"):
        quantize_with_feedback(weight_of(8, 512), factor, "Q4_0")
    with pytest.raises(InputError, match="Gram matrix"):
        factorize_orders(Known(torch.eye(48)))
    weight[3, 7] = float("nan")
    with pytest.raises(InputError, match="NaN or infinity"):
        quantize_with_feedback(weight, factor, "Q4_0")


@pytest.mark.parametrize("linear", ["up_proj", "down_proj"])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, linear: str) -> None:
    model = checkpoint(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    key = f"model.layers.1.mlp.{linear}.weight"
    tensors[key][3, 5] = torch.nan
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    (tmp_path / "text.txt").write_text("\n".join(TEXT * 30), encoding="utf-8")
    rows = f"calibration={{dataset: {tmp_path}/text.txt, samples: 4, sequence_length: 32}}"
    job = prepare(load_recipe("gguf-q4-k-m-gptq", [rows]), str(model))
    with pytest.raises(InputError, match=key):
        make(job, tmp_path / "out", device="cpu", force=False, progress=Silent(), cache=False)
    assert not (tmp_path / "out").exists()
