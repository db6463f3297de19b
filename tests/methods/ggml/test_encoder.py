"""ggml's own rounding: bounded errors, importance weights, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.base.errors import InputError, MachineError
from quantkit.methods.ggml import library
from quantkit.methods.ggml.encoder import quantize_by_ggml
from quantkit.methods.ggml.types import (
    PORTABLE,
    TERNARY,
    TYPES,
    GgmlTensor,
    available,
    row_bytes,
)

gguf = pytest.importorskip("gguf")

# Upper bounds of ‖W - Ŵ‖² / ‖W‖² for Gaussian weights, a little above the types' own errors.
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
    "Q4_K" not in available(), reason="llama.cpp's library (xllamacpp) is not installed"
)


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return torch.randn(96, 512, generator=torch.Generator().manual_seed(0)).bfloat16()


def error(weight: Tensor, quantized: GgmlTensor, importance: Tensor | None = None) -> float:
    squares = (weight.float() - quantized.dequantize()).square()
    whole = weight.float().square()
    if importance is not None:
        squares, whole = squares * importance, whole * importance
    return float(squares.sum() / whole.sum())


@native
@pytest.mark.parametrize("type", BOUNDS)
def test_error_is_bounded(weight: Tensor, type: str) -> None:
    quantized = quantize_by_ggml(weight, type)
    assert quantized.shape == weight.shape
    assert quantized.blocks.shape == (96, row_bytes(type, 512))
    assert error(weight, quantized) < BOUNDS[type]


@native
@pytest.mark.parametrize("type", TYPES)
def test_every_type_can_be_dequantized(weight: Tensor, type: str) -> None:
    quantized = quantize_by_ggml(weight, type, torch.rand(512) + 0.1)
    bits = 8 * row_bytes(type, 512) / 512
    # A few times the rate-distortion bound of a Gaussian, 4^-bits. Ternary types are made for
    # weights that were trained to be ternary.
    slack = 12 if type in TERNARY else 6
    assert error(weight, quantized) < slack * 4.0 ** -min(bits, 9.5)


@native
@pytest.mark.parametrize("type", ["Q8_0", "Q4_K", "Q6_K", "IQ3_S"])
def test_the_package_gguf_reads_the_blocks_alike(weight: Tensor, type: str) -> None:
    quantized = quantize_by_ggml(weight, type)
    kind = gguf.GGMLQuantizationType[type]
    value = gguf.quants.dequantize(quantized.blocks.numpy(), kind)
    assert torch.equal(quantized.dequantize(), torch.from_numpy(value))


@native
@pytest.mark.parametrize("type", ["Q2_K", "Q4_K", "Q6_K", "IQ4_XS", "IQ3_XXS"])
def test_importance_lowers_the_weighted_error(weight: Tensor, type: str) -> None:
    importance = torch.rand(512, generator=torch.Generator().manual_seed(1)) ** 4
    plain = error(weight, quantize_by_ggml(weight, type), importance)
    assert error(weight, quantize_by_ggml(weight, type, importance), importance) < 0.9 * plain


@native
def test_threads_do_not_change_a_byte() -> None:
    weight = torch.randn(1100, 1024, generator=torch.Generator().manual_seed(2))
    importance = torch.rand(1024)
    one, two, five = (
        quantize_by_ggml(weight, "Q4_K", importance, threads=threads) for threads in (1, 2, 5)
    )
    assert torch.equal(one.blocks, two.blocks) and torch.equal(one.blocks, five.blocks)


@native
@pytest.mark.parametrize("type", PORTABLE)
def test_gguf_py_writes_the_same_bytes(
    weight: Tensor, type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_ggml = quantize_by_ggml(weight, type)
    monkeypatch.setattr(library, "load_quantizer", lambda: None)
    assert torch.equal(quantize_by_ggml(weight, type).blocks, by_ggml.blocks)


@native
def test_inputs_that_are_always_zero_keep_their_weights(weight: Tensor) -> None:
    importance = torch.ones(512)
    importance[:256] = 0
    quantized = quantize_by_ggml(weight, "Q6_K", importance)
    assert error(weight[:, :256], quantize_by_ggml(weight[:, :256], "Q6_K")) < BOUNDS["Q6_K"]
    difference = (weight.float() - quantized.dequantize())[:, :256].square().sum()
    assert difference / weight[:, :256].float().square().sum() < BOUNDS["Q6_K"]
    unweighted = quantize_by_ggml(weight, "Q6_K", torch.zeros(512))
    assert torch.equal(unweighted.blocks, quantize_by_ggml(weight, "Q6_K").blocks)


def test_casts(weight: Tensor) -> None:
    for type in ("BF16", "F32"):
        quantized = quantize_by_ggml(weight, type)
        assert torch.equal(quantized.dequantize(), weight.float())
    assert error(weight, quantize_by_ggml(weight, "F16")) < 1e-12
    norm = quantize_by_ggml(weight[0], "F32")
    assert norm.shape == (512,) and torch.equal(norm.dequantize(), weight[0].float())
    with pytest.raises(InputError, match="infinity"):
        quantize_by_ggml(torch.full((1, 4), 1e6), "F16")


def test_what_can_not_be_quantized_is_refused(weight: Tensor) -> None:
    with pytest.raises(InputError, match="don't fit rows of 512"):
        quantize_by_ggml(weight, "Q8_0", torch.ones(511))
    with pytest.raises(InputError, match="not negative"):
        quantize_by_ggml(weight, "Q8_0", -torch.ones(512))
    broken = weight.clone()
    broken[95, 511] = float("inf")
    for type in ("F32", "Q8_0", *(["Q4_K"] if "Q4_K" in available() else [])):
        with pytest.raises(InputError, match="NaN or infinity"):
            quantize_by_ggml(broken, type)


@native
def test_types_that_need_importance_are_refused_without(weight: Tensor) -> None:
    with pytest.raises(InputError, match="importance"):
        quantize_by_ggml(weight, "IQ2_XS")


def test_without_llama_cpp_the_missing_package_is_named(
    weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "load_quantizer", lambda: None)
    with pytest.raises(MachineError, match="Q4_K needs llama") as caught:
        quantize_by_ggml(weight, "Q4_K")
    assert caught.value.fix == "pip install 'quantkit[gguf]'"
    with pytest.raises(MachineError, match="importance weights"):
        quantize_by_ggml(weight, "Q4_0", torch.ones(512))
