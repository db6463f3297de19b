"""Recipes and suites: every key validated, every error naming file, key and fix."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantkit.base import resources
from quantkit.base.errors import InputError
from quantkit.cli import app
from quantkit.commands.quantize import prepare
from quantkit.judging.cases import load_cases
from quantkit.methods.awq.method import Awq
from quantkit.recipes.recipe import load_recipe, shipped_recipes
from quantkit.recipes.suite import load_suite

SHIPPED = sorted(path.stem for path in resources.recipes().glob("*.yaml"))
SUITES = sorted(path.stem for path in resources.suites().glob("*.yaml"))


def test_what_ships() -> None:
    wanted = {"awq-w4-g128", "gptq-w4-g128", "nf4", "gguf-q4-k-m", "gguf-q8-0", "rtn-w4-g128"}
    assert wanted <= set(SHIPPED)
    assert "demo" in SUITES


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_load(name: str) -> None:
    loaded = load_recipe(name)
    assert loaded.recipe.name == name
    dataset = loaded.calibration_dataset()
    assert dataset is None or (isinstance(dataset, Path) and dataset.is_file())


@pytest.mark.parametrize("name", SUITES)
def test_shipped_suites_load(name: str) -> None:
    loaded = load_suite(name)
    dataset = loaded.likelihood_dataset()
    assert isinstance(dataset, Path) and dataset.is_file()
    if loaded.suite.regression is not None:
        assert len(load_cases(loaded.resolve(loaded.suite.regression.cases))) >= 60


def test_digest_is_of_the_content_not_of_the_text(tmp_path: Path) -> None:
    text = (resources.recipes() / "nf4.yaml").read_text()
    same = tmp_path / "same.yaml"
    same.write_text("# a comment\n" + text.replace("double_quant: true", "double_quant:   true"))
    other = tmp_path / "other.yaml"
    other.write_text(text.replace("double_quant: true", "double_quant: false"))
    digest = load_recipe("nf4").recipe.digest
    assert load_recipe(str(same)).recipe.digest == digest
    assert load_recipe(str(other)).recipe.digest != digest


def test_shipped_digests_differ() -> None:
    digests = [loaded.recipe.digest for loaded in shipped_recipes()]
    assert len(set(digests)) == len(digests)


def test_set_makes_a_derived_recipe() -> None:
    plain, derived = load_recipe("awq-w4-g128"), load_recipe("awq-w4-g128", ["quantize.bits=8"])
    assert derived.recipe.name == "awq-w4-g128+set"
    assert derived.recipe.digest != plain.recipe.digest
    assert isinstance(derived.recipe.quantize, Awq) and derived.recipe.quantize.bits == 8


def test_a_dataset_given_with_set_is_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    loaded = load_recipe("awq-w4-g128", ["calibration.dataset=mine.txt"])
    assert loaded.calibration_dataset() == (tmp_path / "mine.txt").resolve()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("quantize.group_sze=64", "quantize.group_sze: unknown key; did you mean group_size"),
        ("quantize.bits=four", "quantize.bits: input should be a valid integer, not 'four'"),
        ("quantize.bits=9", "quantize.bits: input should be less than or equal to 8"),
        (
            "quantize.method=awk",
            "quantize.method must be one of rtn, gptq, awq, smoothquant, fp8, nf4, ggml",
        ),
        ("qantize=1", "qantize: unknown key; did you mean quantize"),
        ("quantize.group_size=4", "group_size 4 must be -1"),
        ("quantize.overrides=[{match: x, bit: 8}]", "overrides.0.bit: unknown key; did you mean b"),
        ("calibration.sampels=3", "calibration.sampels: unknown key; did you mean samples"),
        ("calibration=null", "method awq needs a calibration section"),
        ("schema=2", "schema: input should be 1"),
        ("version=1.0", "version: input should be a valid string"),
        ("nonsense", "isn't key=value"),
        ("name.x=1", "names no section"),
    ],
)
def test_mistakes_are_named(setting: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe("awq-w4-g128", [setting])
    assert message in str(caught.value)


def test_a_name_nearly_right_is_suggested() -> None:
    with pytest.raises(InputError) as caught:
        load_recipe("awq-w4-g182")
    assert "Did you mean awq-w4-g128?" in (caught.value.fix or "")


def test_a_file_that_is_not_yaml(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1,\n")
    with pytest.raises(InputError, match=r"bad\.yaml isn't valid YAML"):
        load_recipe(str(bad))
    bad.write_text("just text\n")
    with pytest.raises(InputError, match="holds no mapping"):
        load_recipe(str(bad))


def test_a_recipe_and_a_suite_through_a_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a shell makes for ``<(command)``: paths inside are relative to the working directory."""
    monkeypatch.chdir(tmp_path)

    def piped(text: str) -> str:
        reads, writes = os.pipe()
        os.write(writes, text.encode())
        os.close(writes)
        return f"/dev/fd/{reads}"

    source = resources.recipes() / "gptq-w4-g128.yaml"
    text = source.read_text().replace("../calibration/general-v1.jsonl", "here.txt")
    recipe = load_recipe(piped(text))
    assert recipe.recipe.digest != load_recipe(str(source)).recipe.digest
    assert recipe.calibration_dataset() == tmp_path / "here.txt"
    suite = load_suite(piped((resources.suites() / "demo.yaml").read_text()))
    assert suite.suite.digest == load_suite("demo").suite.digest
    with pytest.raises(InputError, match="isn't valid YAML"):
        load_recipe(piped("a: [b"))


def test_a_default_spelt_out_is_no_other_recipe(tmp_path: Path) -> None:
    text = (resources.recipes() / "nf4.yaml").read_text()
    same = tmp_path / "same.yaml"
    same.write_text(text + "calibration: null\n")
    loaded = load_recipe(str(same)).recipe
    assert loaded.digest == load_recipe("nf4").recipe.digest
    assert "calibration" not in loaded.canonical()  # nor would a key be that is added later


def test_every_shipped_recipe_is_in_the_readme_as_it_is() -> None:
    lines = (resources.recipes() / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split("|")[1:4] for line in lines if line.startswith("| [")]
    found = {tuple(cell.strip() for cell in row) for row in rows}
    recipes = [loaded.recipe for loaded in shipped_recipes()]
    wanted = {(f"[{r.name}]({r.name}.yaml)", r.version, f"`{r.digest[:12]}`") for r in recipes}
    assert found == wanted, "run: python -m benchmarks.recipe_table"


@pytest.mark.parametrize(
    ("recipe", "settings", "said"),
    [
        ("gptq-w4-g128", ["quantize.symmetric=false"], "vLLM doesn't load gptq in the format gptq"),
        ("gptq-w4-g128", ["quantize.bits=3"], "3 bits"),
        ("nf4", [], "no bitsandbytes method"),
        ("gguf-q4-k-m", [], "no GGUF method"),
    ],
)
def test_what_the_target_cannot_load_is_refused_before_work(
    tmp_path: Path, recipe: str, settings: list[str], said: str
) -> None:
    out = tmp_path / "out"
    flags = [part for text in [*settings, "target=vllm"] for part in ("--set", text)]
    arguments = ["quantize", recipe, "--model", "demo", "--out", str(out), *flags]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "target: vLLM doesn't load" in " ".join(result.stderr.split())
    assert said in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_what_the_target_loads_passes() -> None:
    for recipe in ("gptq-w4-g128", "awq-w4-g128", "ct-w4a16-g128", "int8-w8a8", "fp8"):
        assert prepare(load_recipe(recipe, ["target=vllm"]), "demo").plan.tensors
    # Known of vLLM's CPU build alone, so it may be meant for a GPU.
    assert prepare(load_recipe("gptq-w4-g128", ["quantize.bits=8", "target=vllm"]), "demo")


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
def test_mistakes_of_methods_that_round_inputs_are_named(
    recipe: str, setting: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_recipe(recipe, [setting])
