"""ggml's block types: sizes, errors, importance weights, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.base.errors import InputError, MachineError
from quantkit.methods.ggml import types as ggml

gguf = pytest.importorskip("gguf")

# Upper bounds on ‖W-Ŵ‖²/‖W‖² for Gaussian weights, somewhat above what the types reach.
BOUNDS = {
    "Q8_0": 4e-5,
    "Q6_K": 4e-4,
    "Q5_K": 1.6e-3,
    "Q5_0": 2.2e-3,
    "Q4_K": 6e-3,
    "IQ4_XS": 7e-3,
    "Q4_0": 9e-3,
    "Q3_K": 0.027,
    "Q2_K": 0.1,
}
native = pytest.mark.skipif(
    "Q4_K" not in ggml.available(), reason="llama.cpp's library (xllamacpp) is not installed"
)


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return torch.randn(96, 512, generator=torch.Generator().manual_seed(0)).bfloat16()


def error(weight: Tensor, quantized: ggml.GgmlTensor, importance: Tensor | None = None) -> float:
    squares = (weight.float() - quantized.dequantize()).square()
    whole = weight.float().square()
    if importance is not None:
        squares, whole = squares * importance, whole * importance
    return float(squares.sum() / whole.sum())


@native
@pytest.mark.parametrize("type", BOUNDS)
def test_error_is_bounded(weight: Tensor, type: str) -> None:
    quantized = ggml.quantize(weight, type)
    assert quantized.shape == weight.shape
    assert quantized.blocks.shape == (96, ggml.row_bytes(type, 512))
    assert error(weight, quantized) < BOUNDS[type]


@native
@pytest.mark.parametrize("type", ggml.TYPES)
def test_every_type_comes_back(weight: Tensor, type: str) -> None:
    quantized = ggml.quantize(weight, type, torch.rand(512) + 0.1)
    bits = 8 * ggml.row_bytes(type, 512) / 512
    # A few times a Gaussian's rate-distortion bound, 4^-bits; ternary is made for other weights.
    slack = 12 if type in ggml.TERNARY else 6
    assert error(weight, quantized) < slack * 4.0 ** -min(bits, 9.5)


@native
@pytest.mark.parametrize("type", ["Q8_0", "Q4_K", "Q6_K", "IQ3_S"])
def test_blocks_are_ggufs(weight: Tensor, type: str) -> None:
    quantized = ggml.quantize(weight, type)
    kind = gguf.GGMLQuantizationType[type]
    value = gguf.quants.dequantize(quantized.blocks.numpy(), kind)
    assert torch.equal(quantized.dequantize(), torch.from_numpy(value))


@native
@pytest.mark.parametrize("type", ["Q2_K", "Q4_K", "Q6_K", "IQ4_XS", "IQ3_XXS"])
def test_importance_lowers_the_weighted_error(weight: Tensor, type: str) -> None:
    importance = torch.rand(512, generator=torch.Generator().manual_seed(1)) ** 4
    plain = error(weight, ggml.quantize(weight, type), importance)
    assert error(weight, ggml.quantize(weight, type, importance), importance) < 0.9 * plain


@native
def test_threads_do_not_change_a_byte() -> None:
    weight = torch.randn(1100, 1024, generator=torch.Generator().manual_seed(2))
    importance = torch.rand(1024)
    one, two, five = (
        ggml.quantize(weight, "Q4_K", importance, threads=threads) for threads in (1, 2, 5)
    )
    assert torch.equal(one.blocks, two.blocks) and torch.equal(one.blocks, five.blocks)


@native
@pytest.mark.parametrize("type", ggml.PORTABLE)
def test_gguf_py_writes_the_same_bytes(
    weight: Tensor, type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_ggml = ggml.quantize(weight, type)
    monkeypatch.setattr(ggml, "_library", lambda: None)
    assert torch.equal(ggml.quantize(weight, type).blocks, by_ggml.blocks)


@native
def test_inputs_that_calibration_never_excited_keep_their_weights(weight: Tensor) -> None:
    importance = torch.ones(512)
    importance[:256] = 0
    quantized = ggml.quantize(weight, "Q6_K", importance)
    assert error(weight[:, :256], ggml.quantize(weight[:, :256], "Q6_K")) < BOUNDS["Q6_K"]
    lost = (weight.float() - quantized.dequantize())[:, :256].square().sum()
    assert lost / weight[:, :256].float().square().sum() < BOUNDS["Q6_K"]
    nothing = ggml.quantize(weight, "Q6_K", torch.zeros(512))
    assert torch.equal(nothing.blocks, ggml.quantize(weight, "Q6_K").blocks)


def test_casts(weight: Tensor) -> None:
    for type in ("BF16", "F32"):
        quantized = ggml.quantize(weight, type)
        assert torch.equal(quantized.dequantize(), weight.float())
    assert error(weight, ggml.quantize(weight, "F16")) < 1e-12
    norm = ggml.quantize(weight[0], "F32")
    assert norm.shape == (512,) and torch.equal(norm.dequantize(), weight[0].float())
    with pytest.raises(InputError, match="infinite"):
        ggml.quantize(torch.full((1, 4), 1e6), "F16")


def test_refusals(weight: Tensor) -> None:
    with pytest.raises(InputError, match="unknown ggml type"):
        ggml.quantize(weight, "Q8_1")
    with pytest.raises(InputError, match="blocks of 256"):
        ggml.quantize(weight[:, :192], "Q4_K")
    with pytest.raises(InputError, match="importance"):
        ggml.quantize(weight, "Q8_0", torch.ones(511))
    with pytest.raises(InputError, match="not negative"):
        ggml.quantize(weight, "Q8_0", -torch.ones(512))
    broken = weight.clone()
    broken[95, 511] = float("inf")
    for type in ("F32", "Q8_0", *(["Q4_K"] if "Q4_K" in ggml.available() else [])):
        with pytest.raises(InputError, match="NaN or infinite"):
            ggml.quantize(broken, type)


@native
def test_types_that_need_importance(weight: Tensor) -> None:
    with pytest.raises(InputError, match="importance"):
        ggml.quantize(weight, "IQ2_XS")


def test_without_llama_cpp(weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "_library", lambda: None)
    assert "Q8_0" in ggml.available() and "Q4_K" not in ggml.available()
    with pytest.raises(MachineError, match="Q4_K needs llama") as caught:
        ggml.quantize(weight, "Q4_K")
    assert caught.value.fix == "pip install 'quantkit[gguf]'"
    with pytest.raises(MachineError, match="importance weights"):
        ggml.quantize(weight, "Q4_0", torch.ones(512))
