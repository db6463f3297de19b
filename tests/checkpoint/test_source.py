"""Names of models: directories, hub ids, and the bundled demo."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantkit.base.errors import InputError
from quantkit.base.resources import demo_model
from quantkit.checkpoint.source import locate_model, model_name
from quantkit.formats.gguf.reader import GgufWeights
from tests.helpers.cli import run

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_models_are_named_by_directory_or_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (locate_model("demo") / "config.json").is_file()
    assert locate_model(str(tmp_path)) == tmp_path
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert locate_model("./demo") == Path("demo") and locate_model("demo") != Path("demo")
    assert model_name("owner/name@main") == "name" and model_name("demo") == "demo"
    assert model_name(str(tmp_path / "demo")) == "demo"
    with pytest.raises(InputError, match="no such directory"):
        locate_model("./nowhere")
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(InputError, match="is a file"):
        locate_model(str(file))


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (f"models--owner--Llama-3/snapshots/{COMMIT}", "Llama-3"),
        (f"models--gpt2/snapshots/{COMMIT}", "gpt2"),
        (f"mounted/Qwen3-4B/snapshots/{COMMIT}", "Qwen3-4B"),
        (f"models--owner--Llama-3/snapshots/{COMMIT}/onnx", "onnx"),
        (f"runs/{COMMIT}", COMMIT),
        ("models--owner--Llama-3/snapshots/main", "main"),
    ],
)
def test_a_snapshot_has_the_name_of_its_model(
    tmp_path: Path, place: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert model_name(f"/not/here/{place}") == name  # as in a report that another machine made
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / place)
    for given in (tmp_path / place, f"{tmp_path / place}/", tmp_path / "link"):
        assert model_name(str(given)) == name
    monkeypatch.chdir(tmp_path / place)
    assert model_name(".") == name


def test_gguf_of_a_snapshot_is_named_by_its_model(tmp_path: Path) -> None:
    snapshot = tmp_path / f"models--owner--My-Model/snapshots/{COMMIT}"
    shutil.copytree(demo_model(), snapshot)
    done = run("quantize", "gguf-q8-0", "--model", snapshot, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    [file] = (tmp_path / "out").glob("*.gguf")
    assert file.name == "My-Model-Q8_0.gguf"
    assert GgufWeights(file).header.metadata["general.name"] == "My-Model"
