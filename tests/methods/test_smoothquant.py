"""SmoothQuant: scales that balance inputs and weights, and what outliers cost without them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantkit.base.progress import Silent
from quantkit.base.resources import demo_model
from quantkit.checkpoint.reader import Checkpoint
from quantkit.commands.quantize import prepare, quantize
from quantkit.judging.quality import judge_quality
from quantkit.methods import smoothquant
from quantkit.recipes.recipe import load_recipe
from quantkit.recipes.suite import load_suite
from tests.helpers.present import present


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_smoothing_balances_inputs_and_weights() -> None:
    """With α of one half, the inputs and weights of a feature get the same size."""
    activation = torch.tensor([100.0, 1.0, 0.01, 0.0])
    weight = random(8, 4)
    s = smoothquant.smoothing_scale(activation, [weight], 0.5)
    assert s.isfinite().all() and (s > 0).all()
    largest = weight.abs().amax(0)
    torch.testing.assert_close((activation / s)[:3], (largest * s)[:3])
    assert torch.equal(smoothquant.smoothing_scale(activation, [weight], 0.0)[:3], 1 / largest[:3])


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, with a few features 16 times as large and their readers' columns divided by 16."""
    directory = tmp_path_factory.mktemp("outliers") / "demo"
    source = Checkpoint(demo_model())
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
    """Mean KL divergence of a model's artifacts, by recipe and its settings."""
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
    monkeypatch.setattr(
        smoothquant, "smoothing_scale", lambda activation, *_: torch.ones_like(activation)
    )
    (plain,) = kl(outliers, tmp_path / "other", {"int8-w8a8": few})
    assert smooth < 1e-3
    assert plain > 3 * smooth
    assert fp8 < 3e-3
