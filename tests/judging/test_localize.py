"""Where quality is lost: the harmed layer comes first, and the patch fixes it."""

from __future__ import annotations

import csv
import json
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from quantkit.base.progress import Silent
from quantkit.base.resources import demo_model, suites
from quantkit.checkpoint.reader import Checkpoint
from quantkit.commands.quantize import prepare, quantize
from quantkit.formats.packed import open_artifact
from quantkit.judging.restoring import Localizer
from quantkit.model.skeleton import Skeleton
from quantkit.plan.fix import fix
from quantkit.plan.recipe import plan_recipe
from quantkit.recipes.recipe import load_recipe, recipe_from
from tests.helpers.cli import run
from tests.helpers.lettered import TEXT, copied
from tests.helpers.tiny import Tiny

HARMED = 2
SUITE = """
schema: 1
name: short
version: 1.0.0
likelihood: {{dataset: {dataset}, sequence_length: 256, rows: 8}}
gates:
  - {{metric: kl_divergence.mean, max: {bound}}}
"""


@pytest.fixture(scope="module")
def harmed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with the same outputs, but weights in one linear that no grid of 4 bits holds.

    A row of up_proj is divided and the column of down_proj that reads it multiplied, by a power of
    two: exact in BF16. One such column in every group of 128 spoils the scales of all groups.
    """
    model = Path(shutil.copytree(demo_model(), tmp_path_factory.mktemp("harmed") / "model"))
    file = model / "model.safetensors"
    weights = load_file(file)
    mlp = f"model.layers.{HARMED}.mlp"
    columns = torch.arange(0, 512, 128)
    weights[f"{mlp}.up_proj.weight"][columns] /= 64
    weights[f"{mlp}.down_proj.weight"][:, columns] *= 64
    save_file(weights, file, metadata={"format": "pt"})
    return model


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("suite") / "short.yaml"
    path.write_text(SUITE.format(dataset=suites() / "demo-heldout.jsonl", bound=0.01))
    return path


@pytest.fixture(scope="module")
def broken(harmed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The harmed demo, quantized by plain rounding."""
    out = tmp_path_factory.mktemp("broken") / "rtn"
    assert run("quantize", "rtn-w4-g128", "--model", harmed, "--out", out).exit_code == 0
    return out


def judged(artifact: Path, model: Path, suite: Path, *more: object) -> tuple[int, dict[str, Any]]:
    """The exit code, and the artifact's row of the comparison."""
    done = run("eval", artifact, "--baseline", model, "--suite", suite, "--json", *more)
    assert done.exit_code in (0, 1), done.output
    (row,) = json.loads(done.stdout)["variants"]
    return done.exit_code, row


def test_the_patch_turns_fail_into_pass(
    harmed: Path, broken: Path, suite: Path, tmp_path: Path
) -> None:
    code, row = judged(broken, harmed, suite, "--out", tmp_path / "eval.json")
    assert code == 1 and row["verdict"] == "FAIL"
    found = row["localization"]
    worst, *others = found["places"]
    assert worst["modules"] == [f"model.layers.{HARMED}.mlp.down_proj"]
    assert worst["error"] > 10 * others[0]["error"]
    assert found["kl_divergence"] == pytest.approx(row["quality"]["kl_divergence"]["mean"])
    measured = [p["kl_divergence"] for p in found["places"]]
    assert None not in measured[:5] and set(measured[5:]) == {None}
    assert measured[0] < 0.2 * min(measured[1:5])

    patch = found["patch"]
    assert patch["changes"] == [{"match": worst["modules"][0], "skip": True}]
    assert patch["fixes"] is True
    assert patch["predicted"] == {"kl_divergence.mean": pytest.approx(measured[0])}
    fixed = tmp_path / "rtn-w4-g128-fixed.yaml"
    done = run("quantize", fixed, "--model", harmed, "--out", tmp_path / "fixed")
    assert done.exit_code == 0, done.output
    manifest = json.loads((tmp_path / "fixed" / "quantkit.json").read_text())
    assert (manifest["recipe"]["name"], manifest["recipe"]["version"]) == (fixed.stem, "1.1.0")
    before = json.loads((broken / "quantkit.json").read_text())["weights_bytes"]
    assert manifest["weights_bytes"] - before == pytest.approx(patch["added_bytes"], rel=0.01)

    code, row = judged(tmp_path / "fixed", harmed, suite)
    assert code == 0 and row["verdict"] == "PASS" and row["localization"] is None
    reached = row["quality"]["kl_divergence"]["mean"]
    assert reached == pytest.approx(patch["predicted"]["kl_divergence.mean"], rel=0.01)


def test_what_people_see(harmed: Path, broken: Path, suite: Path, tmp_path: Path) -> None:
    arguments = ("compare", broken, "--baseline", harmed, "--suite", suite, "--no-bench")
    done = run(*arguments, "--out", tmp_path / "told")
    assert done.exit_code == 1
    text = (tmp_path / "told" / "comparison.md").read_text()
    place = f"model.layers.{HARMED}.mlp.down_proj"
    for said in (" ".join(done.stdout.split()), " ".join(text.split())):
        assert f"match: {place} skip: true" in said
        assert "predicted KL divergence 0.00" in said and "1 weight, +0.19 MB" in said
    assert "## Where rtn-w4-g128 loses" in text and f"| {place} |" in text
    assert (tmp_path / "told" / "rtn-w4-g128-fixed.yaml").is_file()

    done = run(*arguments, "--no-locate", "--out", tmp_path / "untold")
    assert done.exit_code == 1 and "--locate finds the layers" in done.stderr
    assert not list((tmp_path / "untold").glob("*.yaml"))


def test_artifacts_of_one_name_are_told_apart_everywhere(
    harmed: Path, suite: Path, tmp_path: Path
) -> None:
    names = ["g64/out", "g128/out"]
    for size in (64, 128):
        setting, out = f"quantize.group_size={size}", tmp_path / f"g{size}" / "out"
        done = run("quantize", "rtn-w4-g128", "--model", harmed, "--set", setting, "--out", out)
        assert done.exit_code == 0, done.output
    artifacts, report = [tmp_path / name for name in names], tmp_path / "report"
    arguments = ("compare", *artifacts, "--baseline", harmed, "--suite", suite, "--no-bench")
    done = run(*arguments, "--out", report, "--locate")
    assert done.exit_code == 1
    assert [row[1] for row in csv.reader((report / "comparison.csv").open())][-2:] == names
    suites = ET.parse(report / "junit.xml").getroot().iter("testsuite")
    assert [element.get("name") for element in suites] == names
    for text in (done.stdout, done.stderr, *(path.read_text() for path in report.iterdir())):
        if "quantize:" not in text:  # the fixed recipes
            assert all(name in text for name in names)
    for name, size in (("rtn-w4-g128+set-fixed", 64), ("rtn-w4-g128+set-fixed-2", 128)):
        recipe = yaml.safe_load((report / f"{name}.yaml").read_text())
        assert (recipe["name"], recipe["quantize"]["group_size"]) == (name, size)


def test_a_gguf_is_fixed_by_another_type(harmed: Path, tmp_path: Path) -> None:
    settings = ("--set", "calibration.samples=2", "--no-cache")
    out = tmp_path / "q2"
    done = run("quantize", "gguf-q2-k-gptq", "--model", harmed, "--out", out, *settings)
    assert done.exit_code == 0, done.output
    strict = tmp_path / "strict.yaml"
    strict.write_text(SUITE.format(dataset=suites() / "demo-heldout.jsonl", bound=0.004))
    code, row = judged(out, harmed, strict, "--out", tmp_path / "eval.json")
    assert code == 1
    patch = row["localization"]["patch"]
    assert all(change["type"] == "Q8_0" for change in patch["changes"])
    assert all(change["match"].startswith(("blk.", "token_embd")) for change in patch["changes"])
    fixed = next(tmp_path.glob("*-fixed.yaml"))
    done = run("quantize", fixed, "--model", harmed, "--out", tmp_path / "fixed", "--no-cache")
    assert done.exit_code == 0, done.output
    code, row = judged(tmp_path / "fixed", harmed, strict)
    assert code == 0, row["quality"]["kl_divergence"]


def test_without_a_manifest_there_is_a_ranking_and_no_patch(
    harmed: Path, broken: Path, suite: Path, tmp_path: Path
) -> None:
    foreign = Path(shutil.copytree(broken, tmp_path / "foreign"))
    (foreign / "quantkit.json").unlink()
    _, row = judged(foreign, harmed, suite)
    found = row["localization"]
    assert f"model.layers.{HARMED}.mlp.down_proj" in found["places"][0]["modules"]
    assert found["patch"] is None and "no quantkit.json" in found["no_patch"]


def test_a_damaged_tensor_is_found(harmed: Path, broken: Path, suite: Path, tmp_path: Path) -> None:
    spoilt = Path(shutil.copytree(broken, tmp_path / "spoilt"))
    file = spoilt / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.scales"][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    code, row = judged(spoilt, harmed, suite)
    assert code == 1
    finite = [p for p in row["localization"]["places"][:5] if (p["kl_divergence"] or 9) < 9]
    assert [place["modules"] for place in finite] == [["model.layers.1.mlp.down_proj"]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Localizer]:
    """The demo and its localizer for an artifact of the given recipe."""

    def make(recipe: str, *settings: str) -> Localizer:
        out = tmp_path_factory.mktemp("pair") / "artifact"
        job = prepare(load_recipe(recipe, list(settings)), "demo")
        quantize(job, out, device="cpu", force=False, progress=Silent(), cache=False)
        baseline = Checkpoint(demo_model())
        skeletons = (Skeleton(baseline, torch.float32), Skeleton(baseline, torch.float32))
        rows = torch.randint(0, 1024, (4, 64), generator=torch.Generator().manual_seed(0))
        cpu = torch.device("cpu")
        return Localizer(skeletons, baseline, open_artifact(out), rows, cpu, rescaled=False)

    return make


@pytest.mark.parametrize(
    "recipe", ["rtn-w4-g128", "awq-w4-g128", "int8-w8a8", "fp8", "gguf-q4-k-m"]
)
def test_with_every_place_restored_it_is_the_baseline(
    pair: Callable[..., Localizer], recipe: str
) -> None:
    """Exactly, whatever was scaled, rounded or permuted; and nothing stays restored afterwards."""
    samples = [] if recipe in ("rtn-w4-g128", "fp8") else ["calibration.samples=1"]
    localizer = pair(recipe, *samples)
    places = localizer.rank()
    scaled = recipe in ("awq-w4-g128", "int8-w8a8")
    parts = {tuple(name.rpartition(".")[2] for name in place.modules) for place in places}
    assert (("q_proj", "k_proj", "v_proj", "o_proj") in parts) == scaled
    before, restored, one, after = localizer.measure([[], places, places[:1], []])
    assert before.kl.mean() > 1e-5
    assert restored.kl.max() < 1e-9
    assert one.kl.mean() > 0 and not torch.equal(one.kl, before.kl)
    assert torch.equal(before.kl, after.kl)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("recipe", ["rtn-w4-g128", "awq-w4-g128"])
def test_places_of_a_mixture_of_experts(
    model_type: str, recipe: str, tiny: Tiny, tmp_path: Path
) -> None:
    """Experts apart in the checkpoint or in one tensor; scaled together with their router."""
    model = copied(tiny(model_type, torch.bfloat16), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    for key, value in tensors.items():
        if "post_attention_layernorm" in key:  # loud channels, which awq scales
            value[::16] *= 16
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "text.txt").write_text(TEXT * 20)
    settings = ["quantize.group_size=32", "quantize.bits=3", "quantize.format=gptq"]
    if recipe != "rtn-w4-g128":
        settings += [f"calibration.dataset={tmp_path / 'text.txt'}", "calibration.samples=2"]
        settings += ["calibration.sequence_length=32"]
    job = prepare(load_recipe(recipe, settings), str(model))
    quantize(job, tmp_path / "out", device="cpu", force=False, progress=Silent(), cache=False)
    baseline = Checkpoint(model)
    skeletons = (Skeleton(baseline, torch.float32), Skeleton(baseline, torch.float32))
    rows = torch.randint(3, 20, (2, 16), generator=torch.Generator().manual_seed(0))
    artifact, cpu = open_artifact(tmp_path / "out"), torch.device("cpu")
    localizer = Localizer(skeletons, baseline, artifact, rows, cpu, rescaled=False)
    places = localizer.rank()
    mixtures = [place for place in places if any(".experts." in name for name in place.modules)]
    scaled = recipe == "awq-w4-g128"
    assert (len(mixtures) == 3 and {len(place.modules) for place in mixtures} == {12}) == scaled
    found = localizer.measure([[], places, *([place] for place in mixtures[:3])])
    before, restored, *alone = [divergence.kl.mean() for divergence in found]
    assert restored < 1e-9 < before
    assert all(kl < 1.5 * before for kl in alone)


def test_trials_together_are_what_they_are_alone(pair: Callable[..., Localizer]) -> None:
    localizer = pair("rtn-w4-g128", "quantize.bits=2", "quantize.format=gptq")
    places = localizer.rank()
    trials = [places[:1], places[3:5], places[-1:]]
    together = localizer.measure(trials)
    for trial, found in zip(trials, together, strict=True):
        (alone,) = localizer.measure([trial])
        assert torch.equal(alone.kl, found.kl)


@pytest.mark.parametrize(
    ("recipe", "settings", "change"),
    [
        ("rtn-w4-g128", [], {"match": "model.layers.1.mlp.down_proj", "skip": True}),
        ("gptq-w4-g128", [], {"match": "model.layers.1.mlp.down_proj", "bits": 8}),
        (
            "gptq-w4-g128",
            ["quantize.bits=8"],
            {"match": "model.layers.1.mlp.down_proj", "skip": True},
        ),
        ("ct-w4a16-g128", [], {"match": "model.layers.1.mlp.down_proj", "bits": 8}),
        ("nf4", [], {"ignore": "model.layers.1.mlp.down_proj"}),
        ("fp8", [], {"ignore": "model.layers.1.mlp.down_proj"}),
        ("gguf-q4-k-m", [], {"match": "blk.1.ffn_down.weight", "type": "Q8_0"}),
        (
            "gptq-w4-g128",
            ["quantize.format=gguf", "quantize.group_size=32"],
            {"match": "model.layers.1.mlp.down_proj", "bits": 8},
        ),
        ("gguf-q8-0", [], {"match": "blk.1.ffn_down.weight", "type": "BF16"}),
    ],
)
def test_every_recipe_is_fixed_in_its_own_language(
    recipe: str, settings: list[str], change: dict[str, Any]
) -> None:
    module = "model.layers.1.mlp.down_proj"
    given = load_recipe(recipe, settings).recipe
    found = fix(given, [module], [f"{module}.weight"], Checkpoint(demo_model()), "demo")
    assert found.changes == (change,)
    assert found.added_bytes > 0
    fixed = recipe_from(found.content, Path("fixed.yaml"))
    minor = int(given.version.split(".")[1])
    assert fixed.version == f"1.{minor + 1}.0" and fixed.name.endswith("-fixed")
    assert found.nbytes == plan_recipe(fixed, Checkpoint(demo_model()), "demo").nbytes
    again = fix(fixed, [module], [f"{module}.weight"], Checkpoint(demo_model()), "demo")
    assert again.content["name"] == fixed.name and again.content["version"] == f"1.{minor + 2}.0"


def test_a_loss_that_is_spread_is_not_patched(tmp_path: Path, suite: Path) -> None:
    out = tmp_path / "w2"
    settings = ("--set", "quantize.bits=2", "--set", "quantize.format=gptq")
    done = run("quantize", "rtn-w4-g128", "--model", "demo", "--out", out, *settings)
    assert done.exit_code == 0
    strict = tmp_path / "strict.yaml"
    strict.write_text(SUITE.format(dataset=suites() / "demo-heldout.jsonl", bound=0.001))
    code, row = judged(out, demo_model(), strict)
    assert code == 1 and row["localization"]["patch"] is None
    assert "the loss is spread" in row["localization"]["no_patch"]
    assert "more bits" in row["localization"]["no_patch"]
