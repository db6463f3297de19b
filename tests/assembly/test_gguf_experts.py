"""Mixtures of experts in GGUF: each expert by its own tokens, a stack at a time, and resumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit.api import quantize
from quantkit.base.errors import InputError
from quantkit.calibration.passing import CalibrationPass
from quantkit.calibration.statistics import InputStatistics
from quantkit.checkpoint.reader import Checkpoint
from quantkit.commands.quantize import prepare
from quantkit.commands.quantize import quantize as run_job
from quantkit.formats.gguf.file import plan_file
from quantkit.formats.gguf.reader import GgufWeights
from quantkit.methods.ggml.encoder import quantize_by_ggml
from quantkit.methods.ggml.method import Matrix
from quantkit.methods.gptq.mix import GptqMix
from quantkit.methods.grids import gram_loss
from quantkit.methods.linears import QuantizedLinear
from quantkit.recipes.recipe import load_recipe
from quantkit.results.manifest import LayerReport
from tests.helpers.demo_runs import Stopped, StopsAfter, digests
from tests.helpers.gguf_tiny import MIXTURES, TEXT, change, checkpoint
from tests.helpers.present import present

pytest.importorskip("xllamacpp")

ROWS, LENGTH, CHOSEN = 4, 64, 2
PLAIN = {"method": "ggml", "mix": "q4_k_m"}
FEEDBACK = {"method": "gptq", "mix": "q4_k_m"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint with a tensor for each expert, and one with a tensor for all of a layer."""
    folder = tmp_path_factory.mktemp("mixtures")
    made = {name: folder / name for name in ("qwen3_moe", "gpt_oss")}
    for name, path in made.items():
        path.mkdir()
        checkpoint(path, model_type=name, **MIXTURES[name])
    return made


def recipe(folder: Path, **quantization: Any) -> Path:
    (folder / "text.txt").write_text("\n".join(TEXT * 40))
    content: dict[str, Any] = {"schema": 1, "name": "mine", "version": "1.0.0"}
    content["quantize"] = {"format": "gguf", **quantization}
    if quantization["method"] != "rtn":
        rows = {"samples": ROWS, "sequence_length": LENGTH, "seed": 0}
        content["calibration"] = {"dataset": "text.txt", **rows}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def make(folder: Path, model: Path, name: str = "out", **settings: Any) -> dict[str, LayerReport]:
    """The reports of an artifact, by name."""
    how = recipe(folder, **settings)
    manifest = quantize(how, model=model, out=folder / name, cache=False, device="cpu")
    return {layer.name: layer for layer in manifest.layers}


def job(folder: Path, model: Path, name: str, steps: int | None = None) -> Path:
    """The same by hand, so that it can be stopped."""
    prepared = prepare(load_recipe(str(folder / "recipe.yaml")), str(model))
    progress = StopsAfter(1 << 30 if steps is None else steps)
    out = folder / name
    run_job(prepared, out, device="cpu", force=False, progress=progress, cache=False)
    return out


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_every_expert_is_quantized_from_its_own_tokens(
    models: dict[str, Path], model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grams: dict[str, Tensor] = {}
    importance: dict[str, Tensor] = {}
    original = GptqMix.quantize

    def spy(
        self: GptqMix, inputs: Sequence[InputStatistics], matrices: Mapping[str, Matrix]
    ) -> dict[str, QuantizedLinear]:
        for group in inputs:
            for name in group.consumers:
                grams[str(matrices[name].key)] = group.moment.matrix()
                importance[str(matrices[name].key)] = group.importance()
        return original(self, inputs, matrices)

    monkeypatch.setattr(GptqMix, "quantize", spy)
    model = models[model_type]
    reports = make(tmp_path, model, "feedback", **FEEDBACK)
    make(tmp_path, model, "plain", **PLAIN)
    source = Checkpoint(model)
    plan = plan_file(source, "q4_k_m", imatrix=True)
    viewed = plan.viewed(source)
    weights = {name: GgufWeights(tmp_path / name) for name in ("feedback", "plain")}
    stacks = [t for t in plan.tensors if t.name.endswith("_exps.weight")]
    assert len(stacks) == 6
    for stack in stacks:
        tokens = [reports[part.name].tokens for part in stack.parts]
        assert sum(map(present, tokens)) == CHOSEN * ROWS * LENGTH
        for part in stack.parts:
            key = str(part.key)
            weight = viewed.read(key).float()
            loss = {
                name: float(gram_loss(weight - weights[name].read(key), grams[key]).sum())
                for name in weights
            }
            assert 0 < loss["feedback"] < loss["plain"], part.name
            energy = float(gram_loss(weight, grams[key]).sum())
            assert reports[part.name].error == pytest.approx(loss["feedback"] / energy, rel=0.2)
            by_ggml = quantize_by_ggml(weight, part.type, importance[key]).dequantize()
            assert torch.equal(weights["plain"].read(key), by_ggml)


# Some experts by feedback, as the rows pass, and some by ggml, when the file is written.
BOTH = {**FEEDBACK, "overrides": [{"match": "*up_exps*", "type": "IQ3_S"}]}


@pytest.fixture(scope="module")
def whole(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of an artifact that was made at one go."""
    folder = tmp_path_factory.mktemp("whole")
    recipe(folder, **BOTH)
    return digests(job(folder, models["qwen3_moe"], "whole"))


@pytest.mark.parametrize("steps", [4, 22])  # in the second block, and among ggml's experts
def test_killed_among_experts_ends_in_the_same_bytes(
    models: dict[str, Path], whole: dict[str, str], tmp_path: Path, steps: int
) -> None:
    recipe(tmp_path, **BOTH)
    with pytest.raises(Stopped):
        job(tmp_path, models["qwen3_moe"], "out", steps)
    journal = (tmp_path / "out.partial/unfinished/journal.jsonl").read_text()
    assert ("ffn_up_exps.weight[2]" in journal) == (steps == 22)
    assert "ffn_gate_exps.weight[3]" in journal
    assert digests(job(tmp_path, models["qwen3_moe"], "out")) == whole


def test_an_expert_that_no_token_reaches_is_measured_on_all(
    models: dict[str, Path], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    change(models["qwen3_moe"], model)
    tensors = load_file(model / "model.safetensors")
    for key, value in tensors.items():
        if key.endswith("mlp.gate.weight"):  # all are as good, so that the same two are chosen
            value.zero_()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    reports = make(tmp_path, model, **PLAIN)
    for role in ("gate", "down"):
        counted = [
            (present(report.tokens), report.all_tokens)
            for name, report in reports.items()
            if name.startswith(f"blk.0.ffn_{role}_exps.weight[")
        ]
        assert sorted(counted, key=str) == [(0, True)] * 2 + [(ROWS * LENGTH, None)] * 2


def test_groups_of_experts_give_the_same_file(
    models: dict[str, Path],
    whole: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe(tmp_path, **BOTH)
    parts = CalibrationPass._parts

    def smaller(self: CalibrationPass, index: int) -> list[list[str]]:
        self._budget = 1 << 18
        found = parts(self, index)
        assert len(found) > 2
        return found

    monkeypatch.setattr(CalibrationPass, "_parts", smaller)
    assert digests(job(tmp_path, models["qwen3_moe"], "apart")) == whole


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_integer_grids(models: dict[str, Path], tmp_path: Path, method: str) -> None:
    settings: dict[str, Any] = {"method": method, "bits": 4, "group_size": 32, "symmetric": True}
    reports = make(tmp_path, models["gpt_oss"], **settings)
    assert {r.scheme for name, r in reports.items() if "_exps.weight[" in name} == {"Q4_0"}
    weights, source = GgufWeights(tmp_path / "out"), Checkpoint(models["gpt_oss"])
    viewed = plan_file(source, "q4_0").viewed(source)
    for number in range(4):
        key = f"model.layers.1.mlp.experts.{number}.down_proj.weight"
        wanted = viewed.read(key).float()
        assert float((weights.read(key) - wanted).square().sum() / wanted.square().sum()) < 0.03


def test_a_matrix_that_llama_cpp_splits(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    model = checkpoint(tmp_path / "model", model_type="deepseek_v2", **MIXTURES["deepseek_v2"])
    reports = make(tmp_path, model, **FEEDBACK)
    # What llama.cpp multiplies queries by is the transpose, whose inputs aren't the linear's.
    assert reports["blk.0.attn_k_b.weight"].weighted_error is None
    assert present(reports["blk.0.attn_v_b.weight"].weighted_error) > 0
    key = "model.layers.0.self_attn.kv_b_proj.weight"
    value, wanted = GgufWeights(tmp_path / "out").read(key), Checkpoint(model).read(key).float()
    error = (value - wanted).square().view(4, 96, 64).sum((0, 2))
    energy = wanted.square().view(4, 96, 64).sum((0, 2))
    for name, rows in (("attn_k_b", slice(0, 32)), ("attn_v_b", slice(32, 96))):
        measured = float(error[rows].sum() / energy[rows].sum())
        assert reports[f"blk.0.{name}.weight"].error == pytest.approx(measured, rel=1e-3)
    grid: dict[str, Any] = {"method": "rtn", "bits": 4, "group_size": 32, "symmetric": True}
    with pytest.raises(InputError, match=r"kv_b_proj\.weight is stored in two parts"):
        make(tmp_path, model, "grids", **grid)
    make(tmp_path, model, "grids", **grid, ignore=["*.kv_b_proj"])
    assert torch.equal(GgufWeights(tmp_path / "grids").read(key), wanted)


def test_what_is_refused_of_experts(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="set beside each other") as caught:
        make(tmp_path, models["qwen3_moe"], **FEEDBACK, propagate="corrected")
    assert caught.value.fix == "Set quantize.propagate to original."
    grid: dict[str, Any] = {"method": "rtn", "bits": 4, "group_size": 32, "symmetric": True}
    skip = [{"match": "*.experts.1.down_proj", "skip": True}]
    with pytest.raises(InputError, match=r"blk\.0\.ffn_down_exps\.weight holds all experts"):
        make(tmp_path, models["qwen3_moe"], **grid, overrides=skip)
