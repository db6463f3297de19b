"""Checkpoints of other tools are read as the weights that they were packed from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from quantkit.base.errors import InputError
from quantkit.base.progress import Silent
from quantkit.base.resources import demo_model
from quantkit.checkpoint.reader import Checkpoint
from quantkit.cli import app
from quantkit.engines import int4
from quantkit.engines.choose import engine_for
from quantkit.formats.dialects import dialect_of
from quantkit.formats.packed import PackedCheckpoint, open_artifact
from quantkit.judging.quality import judge_quality
from quantkit.model.skeleton import Skeleton
from quantkit.recipes.suite import load_suite
from tests.helpers.foreign_tiny import Packed, awq, code, compressed, gptq, write
from tests.helpers.present import present
from tests.helpers.tiny import Tiny

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
AUTO_ROUND = {
    "quant_method": "auto-round",
    "autoround_version": "0.16.1",
    "bits": 4,
    "group_size": 32,
    "sym": False,
    "data_type": "int",
}


@pytest.fixture(scope="module")
def source(tiny: Any) -> Path:
    return tiny("llama", torch.bfloat16)


def same(expected: dict[str, torch.Tensor], directory: Path) -> PackedCheckpoint:
    """Every weight is what it was packed from; returns what was opened."""
    weights = open_artifact(directory)
    assert isinstance(weights, PackedCheckpoint)
    Skeleton(weights)
    for key, value in expected.items():
        assert torch.allclose(weights.read(key).float(), value.float(), rtol=1e-6, atol=0), key
        assert torch.equal(weights.read_rows(key, 3, 9), weights.read(key)[3:9]), key
    return weights


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_of_any_version(
    source: Path, tmp_path: Path, bits: int, version: int, symmetric: bool
) -> None:
    def pack(name: str, weight: torch.Tensor) -> Packed | None:
        coded = code(weight, bits, 32, symmetric=symmetric, lowest=2 - version)
        return gptq(coded, bits, version=version), coded.weight

    form = "gptq_v2" if version == 2 else "gptq"
    settings = {**GPTQ, "bits": bits, "sym": symmetric, "checkpoint_format": form}
    weights = same(write(source, tmp_path, settings, pack), tmp_path)
    key = "model.layers.0.mlp.up_proj.weight"
    assert weights.scheme(key) == f"int{bits} g32 {'sym' if symmetric else 'asym'}"
    assert str(weights.dialect) == f"gptq (v{version})"


def test_permuted_groups_are_read_and_run(source: Path, tmp_path: Path) -> None:
    """desc_act with real permutations, and biases of zero as AutoGPTQ writes them."""

    def pack(name: str, weight: torch.Tensor) -> Packed | None:
        coded = code(weight, 4, 32, symmetric=True, permuted=True)
        return gptq(coded, 4), coded.weight

    settings = {**GPTQ, "desc_act": True, "sym": True}
    weights = same(write(source, tmp_path, settings, pack, biases=True), tmp_path)
    assert weights.scheme("model.layers.0.mlp.up_proj.weight") == "int4 g32 sym act-order"
    assert engine_for(tmp_path) == (int4.NAME, tmp_path)
    model, engine = int4.load(weights)
    assert engine == int4.NAME
    for name, linear in model.named_modules():
        if isinstance(linear, int4.Int4Linear):
            x = torch.randn(3, linear.in_features).to(torch.bfloat16)
            wanted = x.float() @ weights.read(f"{name}.weight").t()
            assert (linear(x).float() - wanted).norm() < 0.02 * wanted.norm(), name


def test_a_borrow_between_zero_points_is_undone(source: Path, tmp_path: Path) -> None:
    """GPTQModel takes 1 off whole words; a zero point of 0 then borrows from its neighbor."""

    def pack(name: str, weight: torch.Tensor) -> Packed | None:
        coded = code(weight.abs(), 4, 32)  # all zero points are 0
        coded.zeros[::3] = 7
        return gptq(coded, 4, words=True), coded.weight

    settings = {**GPTQ, "meta": {"quantizer": ["gptqmodel:7.7.0"]}}
    same(write(source, tmp_path, settings, pack), tmp_path)


def test_exceptions_are_read_off_the_tensors(source: Path, tmp_path: Path) -> None:
    """Other bits, groups and kept linears, whatever config.json calls them."""

    def pack(name: str, weight: torch.Tensor) -> Packed | None:
        if name.endswith("o_proj"):
            return None
        bits, group = (8, 16) if name.endswith("down_proj") else (4, 32)
        coded = code(weight, bits, group, symmetric=True)
        return gptq(coded, bits), coded.weight

    dynamic = {r"+:.*\.down_proj": {"bits": 8, "group_size": 16}, r"-:.*o_proj": {}}
    settings = {**GPTQ, "sym": True, "dynamic": dynamic}
    weights = same(write(source, tmp_path, settings, pack), tmp_path)
    assert weights.scheme("model.layers.1.mlp.down_proj.weight") == "int8 g16 sym"
    assert weights.scheme("model.layers.1.self_attn.o_proj.weight") == "bfloat16"


def test_a_last_group_may_be_short(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llama", torch.bfloat16, intermediate_size=160)

    def pack(name: str, weight: torch.Tensor) -> Packed | None:
        coded = code(weight, 4, 64, symmetric=True)
        return gptq(coded, 4), coded.weight

    same(write(source, tmp_path, {**GPTQ, "group_size": 64}, pack), tmp_path)


@pytest.mark.parametrize("beside", [False, True])
def test_awq_of_either_age(source: Path, tmp_path: Path, beside: bool) -> None:
    """Older AutoAWQ wrote quant_config.json, with other names."""

    def pack(name: str, weight: torch.Tensor) -> Packed | None:
        coded = code(weight, 4, 32)
        return awq(coded), coded.weight

    old = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    written = write(
        source,
        tmp_path,
        None if beside else AWQ,
        pack,
        beside=("quant_config.json", old) if beside else None,
    )
    weights = same(written, tmp_path)
    assert weights.scheme("model.layers.0.mlp.up_proj.weight") == "int4 g32 asym"


@pytest.mark.parametrize(
    ("packing", "version"),
    [
        ("auto_round:auto_gptq", 1),
        ("auto_round", 2),
        ("auto_round:gptqmodel", 2),
        ("auto_round:auto_awq", 0),
    ],
)
def test_auto_round_in_its_own_formats(
    source: Path, tmp_path: Path, packing: str, version: int
) -> None:
    def pack(name: str, weight: torch.Tensor) -> Packed | None:
        coded = code(weight, 4, 32, lowest=1)
        return (gptq(coded, 4, version=version) if version else awq(coded)), coded.weight

    settings = {**AUTO_ROUND, "packing_format": packing}
    weights = same(write(source, tmp_path, settings, pack), tmp_path)
    assert weights.dialect.writer == "auto-round 0.16.1"


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_four_bits_by_bitsandbytes(source: Path, tmp_path: Path, kind: str, double: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")

    def pack(name: str, weight: torch.Tensor) -> Packed | None:
        packed, state = functional.quantize_4bit(
            weight, blocksize=64, compress_statistics=double, quant_type=kind
        )
        parts = {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
        return {"weight": packed, **parts}, functional.dequantize_4bit(packed, state)

    settings = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
    }
    weights = same(write(source, tmp_path, settings, pack), tmp_path)
    label = f"{kind} b64{' double' if double else ''}"
    assert weights.scheme("model.layers.0.mlp.up_proj.weight") == label


def test_eight_bits_by_bitsandbytes(source: Path, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")

    def pack(name: str, weight: torch.Tensor) -> Packed | None:
        codes, maxima, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        parts = {"weight": codes, "SCB": maxima, "weight_format": torch.tensor(0).byte()}
        return parts, codes.float() * maxima[:, None] / 127

    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    weights = same(write(source, tmp_path, settings, pack), tmp_path)
    assert weights.scheme("model.layers.0.mlp.up_proj.weight") == "int8 row sym"


def compressed_settings(
    layout: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
    }


@pytest.mark.parametrize("bits", [3, 4, 5, 8])
@pytest.mark.parametrize("padded", [False, True])
def test_compressed_tensors_of_any_bits_and_order(
    source: Path, tmp_path: Path, bits: int, padded: bool
) -> None:
    """Codes that fill words and codes that straddle them, with permuted groups."""

    def pack(name: str, weight: torch.Tensor) -> Packed | None:
        coded = code(weight, bits, 32, permuted=True)
        return compressed(coded, bits, padded=padded), coded.weight

    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": 32,
        "actorder": "group",
    }
    settings = compressed_settings("pack-quantized", weights)
    opened = same(write(source, tmp_path, settings, pack), tmp_path)
    assert opened.scheme("model.layers.0.mlp.up_proj.weight") == f"int{bits} g32 asym act-order"


@pytest.mark.parametrize("kind", ["int", "float"])
def test_one_scale_a_tensor_and_static_inputs(source: Path, tmp_path: Path, kind: str) -> None:
    """llm-compressor's FP8, and the same in int8."""
    largest = 127.0 if kind == "int" else 448.0

    def pack(name: str, weight: torch.Tensor) -> Packed | None:
        scale = weight.float().abs().max()[None] / largest
        value = weight.float() / scale
        codes = value.round().to(torch.int8) if kind == "int" else value.to(torch.float8_e4m3fn)
        parts = {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor([0.25])}
        return parts, codes.float() * scale

    weights = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "tensor"}
    settings = compressed_settings(f"{kind}-quantized", weights, {**weights, "dynamic": False})
    opened = same(write(source, tmp_path, settings, pack), tmp_path)
    rounding = present(opened.input_rounding("model.layers.0.mlp.up_proj.weight"))
    inputs = torch.tensor([[0.3, -1.1, 1e6]])
    top = 127 * 0.25 if kind == "int" else 448 * 0.25
    assert rounding(inputs).tolist()[0] == pytest.approx(
        [0.25, -1.0, top] if kind == "int" else [0.3125, -1.125, top]
    )


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "exl2"}, "exl2"),
        ({**AWQ, "version": "gemv"}, r"awq \(gemv, 4 bits\)"),
        ({**AWQ, "version": "exllama"}, r"awq \(exllama"),
        ({**GPTQ, "checkpoint_format": "marlin"}, r"gptq \(marlin\)"),
        ({**GPTQ, "is_marlin_format": True}, r"gptq \(marlin\)"),
        ({**GPTQ, "pack_dtype": "int16"}, r"gptq \(packed in int16\)"),
        ({**AUTO_ROUND, "packing_format": "auto_round:fp8"}, r"auto-round \(auto_round:fp8"),
        (
            {**AUTO_ROUND, "packing_format": "auto_round:auto_gptq", "act_bits": 8},
            "8-bit activations",
        ),
        ({"quant_method": "compressed-tensors", "transform_config": {"a": 1}}, "rotations"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(InputError, match=f"{name}.*can't be read.*awq"):
        dialect_of(settings, "here")


def test_tensors_that_do_not_belong_together_are_refused(source: Path, tmp_path: Path) -> None:
    def pack(name: str, weight: torch.Tensor) -> Packed | None:
        coded = code(weight, 4, 32, symmetric=True)
        return gptq(coded, 4), coded.weight

    write(source, tmp_path, GPTQ, pack)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.g_idx"][5] = 9
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="its g_idx doesn't name 2 groups"):
        open_artifact(tmp_path).read(f"{name}.weight")
    tensors[f"{name}.scales"] = tensors[f"{name}.scales"][:1]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="don't belong together"):
        open_artifact(tmp_path).read(f"{name}.weight")


@pytest.fixture(scope="module")
def permuted_demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The demo as a GPTQ artifact with permuted groups, and the same weights unpacked."""
    folder = tmp_path_factory.mktemp("demo")

    def pack(name: str, weight: torch.Tensor) -> Packed | None:
        coded = code(weight, 4, 64, permuted=True, lowest=1)
        return gptq(coded, 4), coded.weight

    settings = {**GPTQ, "group_size": 64, "desc_act": True}
    expected = write(demo_model(), folder / "packed", settings, pack, biases=True)
    plain = folder / "plain"
    write(demo_model(), plain, None, lambda name, weight: None)
    save_file({k: v.contiguous() for k, v in expected.items()}, plain / "model.safetensors")
    return folder / "packed", plain


def test_a_foreign_artifact_is_judged_as_its_weights(permuted_demo: tuple[Path, Path]) -> None:
    suite = load_suite("demo")
    suite.suite = suite.suite.model_copy(update={"regression": None})
    quality = judge_quality(
        permuted_demo, Checkpoint(demo_model()), suite, device="cpu", progress=Silent()
    )
    packed, plain = quality.artifacts
    assert packed.perplexity == plain.perplexity and packed.kl_divergence == plain.kl_divergence
    assert 0.0001 < present(packed.kl_divergence).mean < 0.01


def test_an_artifact_of_another_model_does_not_fit(
    source: Path, permuted_demo: tuple[Path, Path], tmp_path: Path
) -> None:
    arguments = ["eval", str(source), "--baseline", "demo", "--suite", "demo"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "doesn't fit the baseline" in result.stderr and "made from" in result.stderr


def test_biases_that_the_model_lacks_are_refused(
    permuted_demo: tuple[Path, Path], tmp_path: Path
) -> None:
    packed, _ = permuted_demo
    for file in packed.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.bias"][7] = 0.5
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"holds model\.layers\.0\.mlp\.up_proj\.bias"):
        Skeleton(open_artifact(tmp_path))


def test_a_gguf_file_is_judged_by_its_name(tmp_path: Path) -> None:
    """What is made by a recipe is read again from a file in a folder with others."""
    from quantkit.formats.gguf.file import plan_file
    from quantkit.formats.gguf.writer import write_file

    baseline = Checkpoint(demo_model())
    for mix in ("q8_0", "q4_0"):
        write_file(tmp_path / f"demo-{mix}.gguf", plan_file(baseline, mix), baseline)
    with pytest.raises(InputError, match=r"holds 2 \.gguf files"):
        open_artifact(tmp_path)
    suite = load_suite("demo")
    suite.suite = suite.suite.model_copy(update={"regression": None})
    files = [tmp_path / "demo-q8_0.gguf", tmp_path / "demo-q4_0.gguf"]
    judged = judge_quality(files, baseline, suite, device="cpu", progress=Silent()).artifacts
    assert present(judged[0].kl_divergence).mean < 0.1 * present(judged[1].kl_divergence).mean
    result = CliRunner().invoke(app, ["inspect", str(files[0]), "--json"])
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["format"] == "gguf (llama)"
    assert {group["scheme"] for group in facts["groups"]} == {"Q8_0", "F32"}
