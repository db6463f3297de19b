"""Keys that hold the names of a wrapper: transformers' model inside it is the oracle."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from quantkit.base.errors import CheckpointWarning, InputError
from quantkit.base.resources import demo_model
from quantkit.checkpoint.reader import Checkpoint
from quantkit.model.skeleton import Skeleton
from tests.helpers.cli import refused, run
from tests.helpers.demo_artifacts import make
from tests.helpers.tiny import Tiny

Rename = Callable[[str], str]


def renamed(base: Path, directory: Path, rename: Rename) -> Path:
    """A copy of a checkpoint whose keys are changed."""
    shutil.copytree(base, directory)
    tensors = load_file(directory / "model.safetensors")
    tensors = {rename(key): tensor for key, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def saved_as_it_was(base: Path, directory: Path, wrap: Callable[[nn.Module], nn.Module]) -> Path:
    """A copy of a checkpoint with the state dict of a model inside a real wrapper of torch's."""
    shutil.copytree(base, directory)
    state = wrap(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)).state_dict()
    unique = {key: tensor.clone() for key, tensor in state.items()}
    save_file(unique, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def compile_layers(model: nn.Module) -> nn.Module:
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    for index, layer in enumerate(layers):
        layers[index] = torch.compile(layer)  # type: ignore[assignment]
    return model


class Trainer(nn.Module):
    """A module of a trainer that holds the model, inside DDP, as ``model``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = nn.DataParallel(model)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt_neox"])
@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (torch.compile, "'_orig_mod' (torch.compile)"),
        (compile_layers, "'_orig_mod' (torch.compile)"),
        (nn.DataParallel, "'module' (DataParallel, DDP or DeepSpeed)"),
        (Trainer, "'module' (DataParallel, DDP or DeepSpeed) and 'model'"),
    ],
    ids=["compiled", "layers-compiled", "parallel", "trainer"],
)
def test_a_model_saved_inside_its_wrapper_is_the_model(
    tiny: Tiny,
    tmp_path: Path,
    model_type: str,
    wrap: Callable[[nn.Module], nn.Module],
    said: str,
) -> None:
    base = tiny(model_type)
    directory = saved_as_it_was(base, tmp_path / "model", wrap)
    with pytest.warns(CheckpointWarning) as told:
        checkpoint = Checkpoint(directory)
    assert said in str(told[0].message)
    oracle = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    names = Skeleton(checkpoint).names
    assert set(names) == set(oracle)
    assert all(torch.equal(checkpoint.read(names[name]), oracle[name]) for name in oracle)


@pytest.mark.filterwarnings("ignore::quantkit.base.errors.CheckpointWarning")
@pytest.mark.parametrize(
    "rename",
    [
        lambda key: "_fsdp_wrapped_module." + key.replace("layers.1.", "layers.1._fpw_module."),
        lambda key: key.replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
        lambda key: "_forward_module.module." + key,
        lambda key: "base_model.model." + key,
        lambda key: "_orig_mod.module._orig_mod." + key,
    ],
    ids=["fsdp", "checkpointing", "fabric", "peft", "several"],
)
def test_known_wrappers_are_seen_anywhere(tiny: Tiny, tmp_path: Path, rename: Rename) -> None:
    base = tiny("llama")
    directory = renamed(base, tmp_path / "model", rename)
    assert set(Checkpoint(directory).keys()) == set(Checkpoint(base).keys())


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (
            lambda key: f"_fsdp_wrapped_module._flat_param{key == 'lm_head.weight'}".removesuffix(
                "True"
            ),
            "flattened into pieces",
        ),
        (
            lambda key: "base_model.model." + key.replace("q_proj.w", "q_proj.base_layer.w"),
            "whose adapter isn't merged",
        ),
        (lambda key: "student." + key, "All its keys begin with 'student.'"),
    ],
    ids=["flat", "adapter", "unknown"],
)
def test_what_cant_be_unwrapped_is_named(
    tiny: Tiny, tmp_path: Path, rename: Rename, message: str
) -> None:
    directory = renamed(tiny("llama"), tmp_path / "model", rename)
    assert message in refused(2, "quantize", "nf4", "--model", directory, "--dry-run")


def test_two_keys_for_one_tensor_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny("llama"), directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["_orig_mod.lm_head.weight"] = tensors["lm_head.weight"] + 1
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(InputError, match=r"both _orig_mod.lm_head.weight and lm_head.weight"):
        Checkpoint(directory)


def test_artifacts_of_a_compiled_model_have_the_models_own_keys(tiny: Tiny, tmp_path: Path) -> None:
    base = tiny("llama", torch.bfloat16)
    directory = renamed(base, tmp_path / "model", lambda key: f"_orig_mod.{key}")
    for name, model in (("plain", base), ("compiled", directory)):
        result = run("quantize", "nf4", "--model", model, "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
        assert result.stderr.count("_orig_mod") == (name == "compiled")
    files = [tmp_path / name / "model.safetensors" for name in ("plain", "compiled")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.filterwarnings("ignore::quantkit.base.errors.CheckpointWarning")
@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.removeprefix("model."),
        lambda key: f"_orig_mod.{key}",
        lambda key: f"model.{key}",
    ],
    ids=["without-head", "compiled", "trainer"],
)
@pytest.mark.parametrize("recipe", ["gguf-q8-0", "gguf-q4-k-m"])
def test_gguf_takes_the_keys_that_other_formats_take(
    tmp_path: Path, rename: Rename, recipe: str
) -> None:
    directory = renamed(demo_model(), tmp_path / "demo", rename)
    few = ["calibration.samples=2"] if recipe == "gguf-q4-k-m" else []
    make(recipe, tmp_path / "plain", few)
    make(recipe, tmp_path / "other", few, model=str(directory))
    [plain], [other] = ((tmp_path / name).glob("*.gguf") for name in ("plain", "other"))
    assert plain.read_bytes() == other.read_bytes()
    checked = run("verify", tmp_path / "other", "--baseline", directory)
    assert checked.exit_code == 0, checked.output
