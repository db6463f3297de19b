"""Weights whose scales 16 bits can't hold are named before any work; ordinary ones never are.

Two linears that follow one another are scaled by powers of two that cancel, so that the model is
the same, and what a scheme loses is what it loses of the ordinary model but for its scales.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.base.errors import InputError
from quantkit.base.resources import demo_model, recipes
from quantkit.commands.quantize import prepare
from quantkit.plan.linears import LinearPlan
from quantkit.recipes.recipe import load_recipe
from tests.helpers.tiny import Tiny

SHIPPED = sorted(path.stem for path in recipes().glob("*.yaml"))


def scaled(target: Path, exponent: int, layers: tuple[int, ...] = (0, 1, 2, 3)) -> Path:
    """The demo with up_proj times 2^exponent, and down_proj divided by it."""
    shutil.copytree(demo_model(), target)
    tensors = load_file(target / "model.safetensors")
    for layer in layers:
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"] *= 2.0**exponent
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"] *= 2.0**-exponent
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """up_proj's weights are about 4e-8, down_proj's 4e4."""
    return scaled(tmp_path_factory.mktemp("far") / "model", -20)


@pytest.mark.parametrize("recipe", SHIPPED)
def test_ordinary_weights_are_held(recipe: str) -> None:
    prepare(load_recipe(recipe), "demo")


@pytest.mark.parametrize("recipe", [name for name in SHIPPED if name not in ("nf4", "fp8")])
def test_weights_that_scales_cannot_hold_are_named(far: Path, recipe: str) -> None:
    with pytest.raises(InputError, match=r"too small for the 16-bit scales of") as caught:
        prepare(load_recipe(recipe), str(far))
    assert "model.layers.0.mlp.up_proj.weight" in str(caught.value)
    assert "down_proj" not in str(caught.value)
    # The error's own words make a recipe that works.
    assert caught.value.fix is not None
    setting, _, value = caught.value.fix.partition("set ")[2].partition(" to ")
    job = prepare(load_recipe(recipe, [f"{setting}={value.rstrip('.')}"]), str(far))
    kept = {t.name for t in job.plan.tensors if not t.quantized and len(t.shape) == 2}
    assert any("up" in name for name in kept) and not any("down" in name for name in kept)


@pytest.mark.parametrize("recipe", ["nf4", "fp8"])
def test_scales_of_more_bits_hold_them(far: Path, recipe: str) -> None:
    prepare(load_recipe(recipe), str(far))


@pytest.mark.parametrize(
    ("recipe", "exponent", "held"),
    [
        ("gguf-q8-0", -4, True),
        ("gguf-q8-0", -12, False),
        ("gguf-q4-k-m", -4, True),
        ("gguf-q4-k-m", -12, False),
        ("rtn-w4-g128", -12, True),
        ("rtn-w4-g128", -18, False),
        ("rtn-w4-g128", 24, False),  # too large, in down_proj's place too small
        ("int8-w8a8", -10, True),
        ("int8-w8a8", -18, False),
    ],
)
def test_the_sizes_that_a_scheme_holds(
    tmp_path: Path, recipe: str, exponent: int, held: bool
) -> None:
    model = scaled(tmp_path / "model", exponent, layers=(2,))
    if held:
        prepare(load_recipe(recipe), str(model))
        return
    with pytest.raises(InputError, match=r"model\.layers\.2\.mlp\.") as caught:
        prepare(load_recipe(recipe), str(model))
    assert "layers.0" not in f"{caught.value} {caught.value.fix}"


@pytest.mark.parametrize("model_type", ["gpt_oss", "llama4_text"])
def test_experts_in_one_tensor_are_tried_too(tiny: Tiny, tmp_path: Path, model_type: str) -> None:
    source = Path(shutil.copytree(tiny(model_type, torch.bfloat16), tmp_path / "model"))
    file = source / "model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if k.endswith("experts.down_proj") and "layers.1." in k)
    assert tensors[key].dim() == 3
    save_file(tensors | {key: tensors[key] * 2.0**-24}, file, metadata={"format": "pt"})
    settings = ["quantize.group_size=32"]
    with pytest.raises(InputError, match="too small for the 16-bit scales") as caught:
        prepare(load_recipe("rtn-w4-g128", settings), str(source))
    assert "layers.1." in caught.value.what and "layers.0." not in caught.value.what
    fix = str(caught.value.fix).partition("set ")[2].rstrip(".").replace(" to ", "=", 1)
    plan = prepare(load_recipe("rtn-w4-g128", [*settings, fix]), str(source)).plan
    assert isinstance(plan, LinearPlan)
    down = [name for name in plan.schemes if "experts." in name and name.endswith("down_proj")]
    assert down and not any("layers.1." in name for name in down)
