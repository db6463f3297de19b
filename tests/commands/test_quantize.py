"""From recipe to artifact on the demo model: what is written, and that it is always the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkit.base.files import read_json, sha256
from quantkit.base.progress import Silent
from quantkit.base.resources import demo_model
from quantkit.checkpoint.reader import Checkpoint
from quantkit.commands.quantize import prepare, quantize
from quantkit.formats.gguf.reader import GgufWeights
from quantkit.formats.packed import PackedCheckpoint, open_artifact
from quantkit.judging.quality import judge_quality
from quantkit.methods.grids import QuantizedTensor
from quantkit.recipes.recipe import load_recipe
from quantkit.recipes.suite import load_suite
from tests.helpers.demo_artifacts import IN_SAFETENSORS, SHIPPED, TWO_BITS, make
from tests.helpers.present import present


@pytest.mark.parametrize("name", [*SHIPPED, "rtn-w2"])
def test_the_manifest_tells_the_truth(artifacts: dict[str, Path], name: str) -> None:
    directory = artifacts[name]
    manifest = json.loads((directory / "quantkit.json").read_text())
    on_disk = {path.name for path in directory.iterdir()} - {"quantkit.json", "run.json"}
    assert manifest["files"].keys() == on_disk
    for file, facts in manifest["files"].items():
        assert facts["sha256"] == sha256(directory / file)
    derived = name == "rtn-w2"
    loaded = load_recipe("rtn-w4-g128", TWO_BITS) if derived else load_recipe(name)
    assert manifest["recipe"]["digest"] == loaded.recipe.digest
    assert manifest["source"]["files"]["model.safetensors"] == sha256(
        demo_model() / "model.safetensors"
    )
    dataset = loaded.calibration_dataset()
    if dataset is not None:
        assert isinstance(dataset, Path)
        assert manifest["calibration"]["dataset_sha256"] == sha256(dataset)
    assert manifest["bits_per_weight"]["quantized"] < manifest["bits_per_weight"]["file"]
    assert all(layer["error"] >= 0 for layer in manifest["layers"])
    assert manifest["summary"]["layers"] == len(manifest["layers"])


@pytest.mark.parametrize("name", SHIPPED)
def test_sidecars_are_copied_byte_for_byte(artifacts: dict[str, Path], name: str) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (artifacts[name] / file).read_bytes() == (demo_model() / file).read_bytes()
    template = "chat_template.jinja"
    assert (artifacts[name] / template).read_bytes() == (demo_model() / template).read_bytes()


@pytest.mark.parametrize("name", IN_SAFETENSORS)
def test_sizes_are_as_planned(artifacts: dict[str, Path], name: str) -> None:
    plan = prepare(load_recipe(name), "demo").plan
    checkpoint = Checkpoint(artifacts[name])
    assert checkpoint.nbytes() == plan.nbytes


def test_the_methods_report_what_they_did(artifacts: dict[str, Path]) -> None:
    awq, gptq = (
        json.loads((artifacts[name] / "quantkit.json").read_text())
        for name in ("awq-w4-g128", "gptq-w4-g128")
    )
    assert gptq["summary"]["not_factorized"] == []
    assert awq["summary"]["scaled"] + len(awq["summary"]["not_scaled"]) == 28
    for layer in range(4):
        scaled = [x for x in awq["layers"] if f"layers.{layer}." in x["name"] and x["scaled"]]
        assert len(scaled) >= 5


@pytest.mark.parametrize("mix", ["q2_k", "q3_k_m", "q5_k_m", "q6_k"])
def test_error_feedback_in_k_quants(tmp_path: Path, mix: str) -> None:
    """Types and size are llama.cpp's, the outputs nearer, the bytes those of any thread count."""
    few = ["calibration.samples=16"]
    name = f"gguf-{mix.replace('_', '-')}-gptq"
    make(name, tmp_path / "feedback", few)
    make("gguf-q4-k-m", tmp_path / "plain", [*few, f"quantize.mix={mix}"])
    ours, theirs = (open_artifact(tmp_path / folder) for folder in ("feedback", "plain"))
    assert isinstance(ours, GgufWeights) and isinstance(theirs, GgufWeights)
    assert ours.types == theirs.types
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        make(name, tmp_path / "again", few)
    finally:
        torch.set_num_threads(threads)
    layers = read_json(tmp_path / "feedback" / "quantkit.json")["layers"]
    measured = {layer["name"]: layer["measured_on"] for layer in layers}
    # The demo's embeddings are tied: the matrix that makes the logits gets feedback too.
    assert {measured["token_embd.weight"], measured["blk.0.attn_q.weight"]} == {"outputs"}
    (file,) = (tmp_path / "feedback").glob("*.gguf")
    (plain,) = (tmp_path / "plain").glob("*.gguf")
    assert sha256(tmp_path / "again" / file.name) == sha256(file)
    assert file.stat().st_size == plain.stat().st_size
    suite = load_suite("demo")
    suite.suite = suite.suite.model_copy(update={"regression": None})
    found = judge_quality(
        [tmp_path / "feedback", tmp_path / "plain"],
        Checkpoint(demo_model()),
        suite,
        device="cpu",
        progress=Silent(),
    )
    kl = [present(quality.kl_divergence).mean for quality in found.artifacts]
    assert kl[0] < 0.8 * kl[1]


@pytest.mark.parametrize("name", SHIPPED)
def test_the_same_inputs_give_the_same_bytes_for_any_number_of_threads(
    artifacts: dict[str, Path], tmp_path: Path, name: str
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        make(name, tmp_path / name)
    finally:
        torch.set_num_threads(threads)
    files = {path.name for path in artifacts[name].iterdir()} - {"run.json"}
    assert files == {path.name for path in (tmp_path / name).iterdir()} - {"run.json"}
    for file in files:
        assert sha256(tmp_path / name / file) == sha256(artifacts[name] / file), file


def test_sharded_checkpoints_are_the_same_model(tmp_path: Path, artifacts: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="1MB")
    AutoTokenizer.from_pretrained(demo_model()).save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    job = prepare(load_recipe("rtn-w4-g128"), str(tmp_path / "sharded"))
    quantize(job, tmp_path / "out", device="cpu", force=False, progress=Silent())
    one, other = Checkpoint(tmp_path / "out"), Checkpoint(artifacts["rtn-w4-g128"])
    assert set(one.keys()) == set(other.keys())
    assert all(torch.equal(one.read(key), other.read(key)) for key in one.entries)


@pytest.mark.parametrize("recipe", ["rtn-w4-g128", "gptq-w4-g128", "awq-w4-g128", "nf4", "fp8"])
def test_a_layer_whose_linears_are_all_ignored(tmp_path: Path, recipe: str) -> None:
    settings = ['quantize.ignore=["lm_head","model.layers.0.*"]']
    if recipe.startswith(("gptq", "awq")):
        settings += ["calibration.samples=2", "calibration.sequence_length=64"]
    job = prepare(load_recipe(recipe, settings), "demo")
    manifest = quantize(job, tmp_path / "out", device="cpu", force=False, progress=Silent())
    layers = {layer.name.split(".")[2] for layer in manifest.layers}
    assert layers == {str(index) for index in range(1, 4)}


def test_overrides_are_obeyed_and_read_back(tmp_path: Path) -> None:
    settings = [
        "quantize.format=gptq",
        "quantize.overrides=[{match: '*.down_proj', bits: 8, group_size: 64},"
        " {match: 'model.layers.0.mlp.*', skip: true}]",
    ]
    make("rtn-w4-g128", tmp_path / "out", settings)
    source = open_artifact(tmp_path / "out")
    assert isinstance(source, PackedCheckpoint)
    down = source.read_quantized("model.layers.1.mlp.down_proj.weight")
    assert isinstance(down, QuantizedTensor)
    assert (down.grid.bits, down.grid.group_size) == (8, 64)
    query = source.read_quantized("model.layers.1.self_attn.q_proj.weight")
    assert isinstance(query, QuantizedTensor) and query.grid.bits == 4
    kept = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(source.read(kept), Checkpoint(demo_model()).read(kept))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert r"-:^model\.layers\.0\.mlp\.up_proj$" in config["dynamic"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["awq-w4-g128", "gptq-w4-g128", "gguf-q4-k-m"])
def test_a_gpu_makes_nearly_the_same_artifact(
    artifacts: dict[str, Path], tmp_path: Path, name: str
) -> None:
    job = prepare(load_recipe(name), "demo")
    quantize(job, tmp_path / name, device="cuda", force=False, progress=Silent())
    mine, theirs = open_artifact(tmp_path / name), open_artifact(artifacts[name])
    original = Checkpoint(demo_model())
    for key in original.entries:
        weight = original.read(key).float()
        errors = [(side.read(key).float() - weight).norm() for side in (mine, theirs)]
        assert abs(errors[0] - errors[1]) <= 0.1 * errors[1] + 1e-6, key
