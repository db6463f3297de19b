"""Artifacts of mixtures of experts and of multimodal models: all there, and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from quantkit.api import dry_run, quantize
from quantkit.assembly.completeness import check_complete
from quantkit.assembly.run import Run
from quantkit.base.errors import InputError, QuantkitError
from quantkit.calibration.passing import CalibrationPass
from quantkit.calibration.statistics import InputStatistics
from quantkit.checkpoint.reader import Checkpoint
from quantkit.commands.quantize import prepare
from quantkit.formats.packed import open_artifact
from quantkit.plan.linears import LinearPlan
from quantkit.recipes.recipe import load_recipe
from tests.helpers.lettered import TEXT, copied
from tests.helpers.present import present
from tests.helpers.tiny import Tiny

ROWS, LENGTH = 2, 32


def recipe(folder: Path, name: str, **settings: Any) -> Path:
    quantization = {"method": name, "bits": 4, "group_size": 32, "symmetric": True, **settings}
    content: dict[str, Any] = {"schema": 1, "name": "mine", "version": "1.0.0"}
    content["quantize"] = quantization
    if name != "rtn":
        (folder / "text.txt").write_text(TEXT * 20)
        rows = {"samples": ROWS, "sequence_length": LENGTH, "seed": 0}
        content["calibration"] = {"dataset": "text.txt", **rows}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def linear_plan(recipe_path: Path, model: Path) -> LinearPlan:
    plan = prepare(load_recipe(str(recipe_path)), str(model)).plan
    assert isinstance(plan, LinearPlan)
    return plan


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "qwen3_vl_moe", "qwen3_5_moe"])
@pytest.mark.parametrize(("method", "format"), [("gptq", "compressed-tensors"), ("awq", "awq")])
def test_every_expert_is_quantized_from_its_own_tokens(
    model_type: str, method: str, format: str, tiny: Tiny, tmp_path: Path
) -> None:
    model = copied(tiny(model_type), tmp_path / "model")
    how = recipe(tmp_path, method, format=format, symmetric=format != "awq")
    manifest = quantize(how, model=model, out=tmp_path / "out", cache=False, device="cpu")
    experts = [layer for layer in manifest.layers if ".experts." in layer.name]
    assert len(experts) == len({layer.name for layer in experts}) and len(experts) % 12 == 0
    for index in {layer.name.split(".experts.")[0] for layer in experts}:
        # Every token goes to two experts.
        counts = [
            layer.tokens
            for layer in experts
            if layer.name.startswith(f"{index}.experts.") and "down_proj" in layer.name
        ]
        assert sum(filter(None, counts)) == 2 * ROWS * LENGTH
    few = [layer for layer in experts if layer.all_tokens]
    assert all(4 * present(layer.tokens) < 96 for layer in few)  # features of the widest input
    assert max(layer.error for layer in experts) < 0.05
    assert manifest.tensors is not None
    fates = manifest.tensors
    counts_of_fates = [fates.quantized, fates.rescaled, fates.copied, fates.unused]
    source = Checkpoint(model)
    assert sum(fate.count for fate in counts_of_fates) == len(list(source.keys()))


def test_an_expert_that_no_token_reaches_is_measured_on_all(tiny: Tiny, tmp_path: Path) -> None:
    model = copied(tiny("mixtral"), tmp_path / "model")
    file = model / "model.safetensors"
    tensors = load_file(file)
    for key, value in tensors.items():
        if key.endswith("gate.weight"):  # all are as good, so that the same two are chosen
            value.zero_()
    save_file(tensors, file, {"format": "pt"})
    how = recipe(tmp_path, "gptq", format="gptq")
    manifest = quantize(how, model=model, out=tmp_path / "out", cache=False, device="cpu")
    experts = {layer.name: layer for layer in manifest.layers if ".experts." in layer.name}
    for layer in range(3):
        names = [f"model.layers.{layer}.mlp.experts.{number}.w1" for number in range(4)]
        reached = sorted((present(experts[n].tokens), experts[n].all_tokens) for n in names)
        assert reached == [(0, True)] * 2 + [(ROWS * LENGTH, None)] * 2


@pytest.mark.parametrize("model_type", ["qwen3_5", "mistral3", "smolvlm", "internvl"])
def test_towers_and_further_heads_are_carried_through(
    model_type: str, tiny: Tiny, tmp_path: Path
) -> None:
    model = copied(tiny(model_type), tmp_path / "model")
    file = model / "model.safetensors"
    tensors = load_file(file)
    if model_type == "qwen3_5":  # a head for the next token but one, which transformers leaves out
        tensors["mtp.fc.weight"] = torch.randn(64, 128)
        tensors["mtp.norm.weight"] = torch.randn(64)
        save_file(tensors, file, {"format": "pt"})
    how = recipe(tmp_path, "rtn", format="compressed-tensors")
    manifest = quantize(how, model=model, out=tmp_path / "out", device="cpu")
    artifact = open_artifact(tmp_path / "out")
    quantized = set(artifact.quantized())
    assert set(artifact.keys()) == set(tensors)
    for key in set(tensors) - quantized:
        assert torch.equal(artifact.read(key), tensors[key]), key
    assert quantized and not any("vis" in key or "mtp" in key for key in quantized)
    assert manifest.tensors is not None and manifest.tensors.unused.count >= 10
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (
        config["architectures"] == json.loads((model / "config.json").read_text())["architectures"]
    )
    if model_type == "qwen3_5":
        assert "mtp.fc" in config["quantization_config"]["ignore"]
        assert {"mtp.fc.weight", "mtp.norm.weight"} <= set(manifest.tensors.unused.names)


@pytest.mark.parametrize("stage", ["removed", "renamed", "added"])
def test_a_planted_omission_is_caught(stage: str, tiny: Tiny, tmp_path: Path) -> None:
    model = copied(tiny("qwen3_moe"), tmp_path / "model")
    how = recipe(tmp_path, "rtn", format="gptq")
    plan = linear_plan(how, model)
    quantize(how, model=model, out=tmp_path / "out", device="cpu")
    check_complete(plan, tmp_path / "out")
    file = tmp_path / "out/model.safetensors"
    tensors = load_file(file)
    for key in ("model.norm.weight", "model.layers.1.mlp.experts.2.up_proj.qweight"):
        changed = dict(tensors)
        value = changed[key] if stage == "added" else changed.pop(key)
        if stage != "removed":
            changed[f"model.other.{key}"] = value.clone()
        if "qweight" in key and stage == "removed":
            for part in ("qzeros", "scales", "g_idx"):
                changed.pop(key.replace("qweight", part))
        save_file(changed, file)
        with pytest.raises(QuantkitError, match=r"lacks|holds"):
            check_complete(plan, tmp_path / "out")


def test_a_lost_tensor_of_the_source_stops_the_work(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the writer forgot what is outside the layers."""
    from quantkit.assembly import safetensors
    from quantkit.assembly.journal import Step

    parts: Any = safetensors._Parts
    monkeypatch.setattr(parts, "outside", lambda self: Step("outside"))
    model = copied(tiny("llama"), tmp_path / "model")
    with pytest.raises(QuantkitError, match=r"lacks .*embed_tokens"):
        quantize(recipe(tmp_path, "rtn", format="gptq"), model=model, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_can_not_be_done_with_experts_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    model = copied(tiny("mixtral"), tmp_path / "model")
    with pytest.raises(InputError, match="which the bitsandbytes format can't hold"):
        dry_run("nf4", model=model)
    corrected = recipe(tmp_path, "gptq", format="gptq", propagate="corrected")
    with pytest.raises(InputError, match="take other ways in the quantized model"):
        dry_run(corrected, model=model)


def test_linears_that_do_not_fit_stay_and_are_named(tiny: Tiny, tmp_path: Path) -> None:
    model = copied(tiny("qwen3_5"), tmp_path / "model")
    plan = dry_run(recipe(tmp_path, "rtn", format="gptq"), model=model)
    small = {name.rpartition(".")[2] for name, why in plan.kept.items() if "divisible" in why}
    assert small == {"in_proj_a", "in_proj_b"}
    assert any("in_proj_a" in note and "isn't divisible" in note for note in plan.notes)
    with pytest.raises(InputError, match="isn't divisible"):
        dry_run(recipe(tmp_path, "rtn", format="gptq", unfit="refuse"), model=model)
    with pytest.raises(InputError, match="group size 48 doesn't divide"):
        dry_run(recipe(tmp_path, "rtn", format="gptq", group_size=48), model=model)


def test_layers_that_hand_on_keys_and_values(tiny: Tiny, tmp_path: Path) -> None:
    model = copied(tiny("gemma4_text"), tmp_path / "model")
    for method, format in (("awq", "awq"), ("gptq", "compressed-tensors")):
        how = recipe(tmp_path, method, format=format, symmetric=format != "awq", group_size=16)
        out = tmp_path / method
        manifest = quantize(how, model=model, out=out, cache=False, device="cpu")
        assert len(manifest.layers) >= 4 * 5 and max(layer.error for layer in manifest.layers) < 0.1
    corrected = recipe(tmp_path, "gptq", format="gptq", propagate="corrected", group_size=16)
    with pytest.raises(InputError, match="hand each other more than hidden states"):
        quantize(corrected, model=model, out=tmp_path / "out", cache=False, device="cpu")


@pytest.mark.parametrize(
    ("model_type", "routers"),
    [
        ("qwen3_moe", ["mlp.gate"]),
        ("mixtral", ["mlp.gate", "block_sparse_moe.gate"]),
        ("gpt_oss", ["mlp.router"]),
    ],
)
def test_engines_are_told_to_leave_routers_alone(
    model_type: str, routers: list[str], tiny: Tiny, tmp_path: Path
) -> None:
    """To vLLM a router is a linear, which it would look for packed tensors of."""
    model = copied(tiny(model_type), tmp_path / "model")
    plan = linear_plan(recipe(tmp_path, "rtn", format="compressed-tensors"), model)
    ignored = plan.quantization_config["ignore"]
    for router in routers:
        assert f"model.layers.1.{router}" in ignored
    assert "model.embed_tokens" not in ignored


@pytest.mark.parametrize("propagate", ["original", "quantized"])
@pytest.mark.parametrize("memory_budget", [None, 1000], ids=["in memory", "on disk"])
def test_experts_are_measured_in_groups_where_their_matrices_exceed_the_budget(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    propagate: str,
    memory_budget: int | None,
) -> None:
    """Some experts at a time, by further passes of the rows: the same bytes."""
    model = copied(tiny("qwen3_moe"), tmp_path / "model")
    mine = recipe(tmp_path, "gptq", format="gptq", propagate=propagate)
    asked: list[int] = []
    measure = CalibrationPass._measure_inputs

    def counted(self: CalibrationPass, *args: Any, **kwargs: Any) -> list[InputStatistics]:
        asked.append(len(args[2]))
        return measure(self, *args, **kwargs)

    monkeypatch.setattr(CalibrationPass, "_measure_inputs", counted)
    made, passes = [], []
    for name, budget in (("whole", 1 << 30), ("parts", 20_000)):
        monkeypatch.setattr(Run, "_statistics", budget)
        out, asked[:] = tmp_path / name, []
        manifest = quantize(
            mine, model=model, out=out, cache=False, device="cpu", memory_budget=memory_budget
        )
        made.append(((out / "model.safetensors").read_bytes(), set(map(str, manifest.layers))))
        passes.append(list(asked))
    whole, parts = passes
    assert len(whole) >= 2 and len(parts) > 2 * len(whole) and sum(parts) == sum(whole)
    assert made[0] == made[1]
