"""Eight bits in weights and inputs: SmoothQuant in int8, and FP8."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantkit.base.errors import InputError, MachineError
from quantkit.base.progress import Silent
from quantkit.base.resources import demo_model
from quantkit.checkpoint.reader import Checkpoint
from quantkit.commands.quantize import prepare, quantize
from quantkit.engines.choose import check_engine, engine_for
from quantkit.formats.compressed_tensors import CompressedTensorsFormat
from quantkit.formats.packed import PackedCheckpoint, open_artifact
from quantkit.judging.quality import judge_quality
from quantkit.methods import fp8, rtn, smoothquant
from quantkit.methods.fp8 import Fp8Scheme, Fp8Tensor
from quantkit.methods.grids import Grid, QuantizedTensor
from quantkit.methods.inputs import Rounding, round_fp8, round_int8
from quantkit.model.skeleton import Skeleton
from quantkit.model.stream import Stream
from quantkit.recipes.recipe import load_recipe
from quantkit.recipes.suite import load_suite
from tests.helpers.present import present
from tests.helpers.stored import stored
from tests.helpers.tiny import build

COMPRESSED = CompressedTensorsFormat()
CPU, BF16 = torch.device("cpu"), torch.bfloat16
INT8 = Grid(8, -1, True, rounds_inputs=True)
SCHEMES = [INT8, Fp8Scheme()]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(
    scheme: Grid | Fp8Scheme, weight: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> tuple[QuantizedTensor | Fp8Tensor, dict[str, torch.Tensor]]:
    tensor = rtn.quantize(weight, scheme) if isinstance(scheme, Grid) else fp8.quantize(weight)
    return tensor, COMPRESSED.pack(tensor, dtype)


def test_each_token_is_rounded_on_its_own() -> None:
    x = random(3, 5, 64) * torch.tensor([1e-3, 1, 50])[:, None, None]
    largest = x.abs().amax(-1, keepdim=True)
    assert ((round_int8(x) - x).abs() <= largest / 254 * 1.001).all()
    # Three bits of mantissa, and subnormal steps of 2^-9 in units of absmax / 448.
    assert ((round_fp8(x) - x).abs() <= (x.abs() / 16).clamp(min=largest / 448 / 1024)).all()
    for rounding in (round_int8, round_fp8):
        assert torch.equal(rounding(x)[1], rounding(x[1]))
        assert torch.equal(rounding(torch.zeros(2, 8)), torch.zeros(2, 8))
        assert rounding(x.bfloat16()).dtype == torch.bfloat16


def test_fp8_codes_are_the_nearest_and_never_infinite() -> None:
    weight = random(16, 128)
    weight[3, 5] = 40.0
    tensor = fp8.quantize(weight)
    assert torch.equal(tensor.scales, tensor.scales.half().float())
    assert torch.equal(tensor.scales, tensor.scales.bfloat16().float())
    assert tensor.codes.float().isfinite().all()
    step = (weight.abs() / 16).clamp(min=tensor.scales / 1024) * 1.01
    assert ((tensor.dequantize() - weight).abs() <= step).all()
    assert fp8.quantize(torch.zeros(2, 8)).dequantize().abs().max() == 0


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_round_trip_and_size(scheme: Fp8Scheme | Grid) -> None:
    tensor, parts = packed(scheme, random(48, 96))
    config = COMPRESSED.config(scheme, {"m": scheme}, ["lm_head"], BF16)
    back = COMPRESSED.unpack(stored(parts, config))
    assert torch.equal(back.dequantize(), tensor.dequantize())
    assert parts["weight"].dtype in (torch.int8, torch.float8_e4m3fn)
    assert parts["weight_scale"].shape == (48, 1)
    assert sum(t.nbytes for t in parts.values()) == COMPRESSED.nbytes((48, 96), scheme, BF16)
    assert COMPRESSED.weight_shape(stored(parts, config)) == (48, 96)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_its_own_library_reads_it(scheme: Fp8Scheme | Grid) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import (
        FloatQuantizationCompressor,
        IntQuantizationCompressor,
    )
    from compressed_tensors.quantization import QuantizationConfig

    config = COMPRESSED.config(scheme, {"m": scheme}, ["lm_head"], BF16)
    group = QuantizationConfig.model_validate(config).config_groups["group_0"]
    codec = IntQuantizationCompressor if scheme == INT8 else FloatQuantizationCompressor
    tensor, parts = packed(scheme, random(48, 96), torch.float32)
    assert torch.equal(codec.decompress(parts, group)["weight"], tensor.dequantize())
    assert group.input_activations.dynamic and group.input_activations.strategy == "token"


def test_inputs_of_a_fixed_scale_are_rounded_by_the_one_stored() -> None:
    config = COMPRESSED.config(INT8, {"m": INT8}, [], BF16)
    config["config_groups"]["group_0"]["input_activations"] |= {
        "dynamic": False,
        "strategy": "tensor",
    }
    rounding = COMPRESSED.input_rounding(stored({"input_scale": torch.tensor(0.5)}, config))
    assert rounding is not None
    assert rounding(torch.tensor([[0.6, -0.2, 1000.0]])).tolist() == [[0.5, 0.0, 63.5]]


def test_smoothing_balances_inputs_and_weights() -> None:
    """At one half, inputs and weights of a feature end with the same size."""
    activation = torch.tensor([100.0, 1.0, 0.01, 0.0])
    weight = random(8, 4)
    s = smoothquant.scale(activation, [weight], 0.5)
    assert s.isfinite().all() and (s > 0).all()
    largest = weight.abs().amax(0)
    torch.testing.assert_close((activation / s)[:3], (largest * s)[:3])
    assert torch.equal(smoothquant.scale(activation, [weight], 0.0)[:3], 1 / largest[:3])


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with a few features sixteen times as large, undone where they are read."""
    directory = tmp_path_factory.mktemp("outliers") / "demo"
    source = Checkpoint(demo_model())
    from safetensors.torch import save_file

    tensors = {key: source.read(key) for key in source.entries}
    for layer in range(4):
        prefix = f"model.layers.{layer}."
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            scale = torch.ones_like(tensors[f"{prefix}{norm}.weight"])
            scale[7::60] = 16
            tensors[f"{prefix}{norm}.weight"] *= scale
            for reader in readers:
                tensors[f"{prefix}{reader}.weight"] /= scale
    directory.mkdir()
    for path in demo_model().iterdir():
        if path.suffix != ".safetensors":
            (directory / path.name).write_bytes(path.read_bytes())
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def kl(model: Path, folder: Path, recipes: dict[str, list[str]]) -> list[float]:
    """Mean KL divergence of a model by some recipes, with their settings."""
    suite = load_suite("demo")
    rows = suite.suite.likelihood.model_copy(update={"rows": 8})
    suite.suite = suite.suite.model_copy(update={"regression": None, "likelihood": rows})
    for name, settings in recipes.items():
        job = prepare(load_recipe(name, settings), str(model))
        quantize(job, folder / name, device="cpu", force=False, progress=Silent(), cache=False)
    judged = judge_quality(
        [folder / name for name in recipes],
        Checkpoint(model),
        suite,
        device="cpu",
        progress=Silent(),
    )
    return [present(quality.kl_divergence).mean for quality in judged.artifacts]


def test_smoothquant_tames_outliers(
    outliers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ["calibration.samples=8"]
    smooth, fp8 = kl(outliers, tmp_path / "one", {"int8-w8a8": few, "fp8": []})
    monkeypatch.setattr(smoothquant, "scale", lambda activation, *_: torch.ones_like(activation))
    (plain,) = kl(outliers, tmp_path / "other", {"int8-w8a8": few})
    assert smooth < 1e-3
    assert plain > 3 * smooth
    assert fp8 < 3e-3


def test_judging_rounds_what_engines_round(tmp_path: Path) -> None:
    """The streamed model's linears see rounded inputs, and only while its weights are in place."""
    directory = build("llama", tmp_path / "tiny", dtype=torch.float32)
    scheme = Fp8Scheme()
    source = Checkpoint(directory)
    name = "model.layers.1.mlp.down_proj"
    x = random(2, 3, 96)

    class Source:
        def keys(self) -> Iterable[str]:
            return source.keys()

        def read(self, key: str) -> torch.Tensor:
            return source.read(key)

        def read_rows(self, key: str, start: int, stop: int) -> torch.Tensor:
            return source.read_rows(key, start, stop)

        def input_rounding(self, key: str) -> Rounding | None:
            config = COMPRESSED.config(scheme, {name: scheme}, [], BF16)
            config["config_groups"]["group_0"]["targets"] = [name]
            module = key.removesuffix(".weight")
            linear = stored({}, config, module)
            return COMPRESSED.input_rounding(linear) if module == name else None

    skeleton = Skeleton(source)
    stream = Stream(skeleton, Source(), CPU)
    weight = source.read(f"{name}.weight")
    with stream.block(1) as block, torch.inference_mode():
        assert torch.equal(block.get_submodule("mlp.down_proj")(x), round_fp8(x) @ weight.t())
        gate = source.read("model.layers.1.mlp.gate_proj.weight")
        y = random(2, 64)
        untouched = torch.nn.functional.linear(y, gate)
        assert torch.equal(block.get_submodule("mlp.gate_proj")(y), untouched)
    assert not skeleton.layers[1].get_submodule("mlp.down_proj")._forward_pre_hooks


def test_artifacts_say_how_they_are_computed(tmp_path: Path) -> None:
    job = prepare(load_recipe("fp8"), "demo")
    quantize(job, tmp_path / "fp8", device="cpu", force=False, progress=Silent())
    artifact = open_artifact(tmp_path / "fp8")
    assert isinstance(artifact, PackedCheckpoint)
    key = "model.layers.0.self_attn.q_proj.weight"
    assert artifact.input_rounding(key) is round_fp8
    assert artifact.input_rounding("model.norm.weight") is None
    assert artifact.shape(key) == Checkpoint(demo_model()).shape(key)
    assert artifact.parameters() == Checkpoint(demo_model()).parameters()
    assert engine_for(tmp_path / "fp8")[0] == "transformers"
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "float-quantized" and config["ignore"] == ["lm_head"]


def test_a_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"quantization_config": {"quant_method": "compressed-tensors"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    monkeypatch.setattr("quantkit.engines.choose.find_spec", lambda name: None)
    with pytest.raises(MachineError, match="needs compressed-tensors for this format"):
        check_engine("transformers", tmp_path)


@pytest.mark.parametrize(
    ("recipe", "setting", "message"),
    [
        ("int8-w8a8", "quantize.alpha=1.5", "quantize.alpha"),
        ("int8-w8a8", "calibration=null", "method smoothquant needs a calibration section"),
        ("int8-w8a8", "quantize.format=awq", "quantize.format"),
        ("fp8", "calibration={dataset: x.txt}", "method fp8 measures nothing"),
        ("fp8", "quantize.overrides=[{match: x, bits: 4}]", "quantize.overrides: unknown key"),
    ],
)
def test_mistakes_in_recipes_are_named(recipe: str, setting: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_recipe(recipe, [setting])
