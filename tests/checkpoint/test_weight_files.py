"""The weights of a directory are those that transformers loads from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from quantkit.artifact.records import checkpoint_digests
from quantkit.base.errors import CheckpointWarning, InputError
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.sidecars import Sidecars, write_config
from quantkit.commands.verify import ArtifactChecks
from tests.helpers.cli import refused, run
from tests.helpers.tiny import Tiny

INDEX = "model.safetensors.index.json"
BOTH = "holds both model.safetensors and model.safetensors.index.json"


def save(directory: Path, seed: int, shards: str = "1GB") -> None:
    """Add weights of the same model to a folder, as saving into it a second time did."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    model.save_pretrained(directory / "new", max_shard_size=shards)
    for path in (directory / "new").glob("*.safetensors*"):
        shutil.copy(path, directory)
    shutil.rmtree(directory / "new")


def older_shards(directory: Path) -> None:
    save(directory, 1, shards="100KB")
    save(directory, 2)


def older_single(directory: Path) -> None:
    save(directory, 1, shards="100KB")


def shards_gone(directory: Path) -> None:
    older_shards(directory)
    for path in directory.glob("model-*.safetensors"):
        path.unlink()


def stale_shards(directory: Path) -> None:
    """Shards of an earlier, finer save beside those that the index names."""
    older_single(directory)
    (directory / "model.safetensors").unlink()
    shard = sorted(directory.glob("model-*"))[0]
    save_file(
        {key: tensor + 1 for key, tensor in load_file(shard).items()},
        directory / "model-00001-of-00099.safetensors",
    )


def in_two_shards(directory: Path) -> None:
    """An indexed shard holds a tensor of another one too."""
    older_single(directory)
    (directory / "model.safetensors").unlink()
    first, last = (load_file(sorted(directory.glob("model-*"))[i]) for i in (0, -1))
    key = next(iter(first))
    last[key] = first[key] + 1
    save_file(last, sorted(directory.glob("model-*"))[-1], metadata={"format": "pt"})


def named_in_config(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    changed = {key: tensor * 2 for key, tensor in tensors.items()}
    save_file(changed, directory / "other.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["transformers_weights"] = "other.safetensors"
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.filterwarnings("ignore::quantkit.base.errors.CheckpointWarning")
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "opt"])
@pytest.mark.parametrize(
    "make",
    [older_shards, older_single, shards_gone, stale_shards, in_two_shards, named_in_config],
)
def test_weights_are_those_that_transformers_loads(
    tiny: Tiny, tmp_path: Path, model_type: str, make: Callable[[Path], None]
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny(model_type), directory)
    make(directory)
    oracle = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()
    checkpoint = Checkpoint(directory)
    for key in checkpoint.entries:
        assert torch.equal(checkpoint.read(key), oracle[key]), key
    digests = checkpoint_digests(checkpoint)
    assert digests.keys() == {"config.json", *(file.name for file in checkpoint.files)}


def test_both_are_told_once_by_every_command(tiny: Tiny, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny("llama"), directory)
    shards_gone(directory)
    with pytest.warns(CheckpointWarning, match=BOTH):
        checkpoint = Checkpoint(directory)
    checks = ArtifactChecks(directory, directory, checkpoint, None).files()
    assert [check.name for check in checks] == ["digests"]  # nothing about the index
    out = tmp_path / "out"
    inspected = run("inspect", directory, "--json")
    made = run("quantize", "nf4", "--model", directory, "--out", out)
    assert inspected.exit_code == made.exit_code == 0, made.output
    assert json.loads(inspected.stdout)["files"] == ["model.safetensors"]
    for result in (inspected, made):
        assert result.stderr.count(BOTH) == 1 and "Warning" not in result.stderr
    manifest = json.loads((out / "quantkit.json").read_text())
    assert sorted(manifest["source"]["files"]) == ["config.json", "model.safetensors"]


def test_an_adapter_beside_the_model_is_told(tiny: Tiny, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny("llama"), directory)
    (directory / "adapter_config.json").write_text("{}")
    with pytest.warns(CheckpointWarning, match="also holds an adapter"):
        Checkpoint(directory)
    assert "adapter_config.json" not in Sidecars.of(directory).files


def test_files_without_an_index_are_read_where_they_hold_different_tensors(
    tiny: Tiny, tmp_path: Path
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny("llama"), directory)
    whole = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").rename(directory / "gptq_model-4bit-128g.safetensors")
    assert set(Checkpoint(directory).keys()) == set(whole)
    save_file({"model.norm.weight": torch.ones(64)}, directory / "model.fp16.safetensors")
    with pytest.raises(InputError, match=r"model\.norm\.weight both in gptq_model-4bit-128g"):
        Checkpoint(directory)


def test_a_pickle_that_transformers_loads_comes_before_files_of_other_names(
    tiny: Tiny, tmp_path: Path
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny("llama"), directory)
    (directory / "model.safetensors").rename(directory / "consolidated.safetensors")
    (directory / "training_args.bin").write_bytes(b"")
    Checkpoint(directory)
    (directory / "pytorch_model.bin").write_bytes(b"")
    message = refused(2, "inspect", directory)
    assert "only as pickle (pytorch_model.bin)" in message
    assert "consolidated.safetensors isn't what transformers loads" in message


@pytest.mark.parametrize(
    "content", ["{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}']
)
def test_an_index_that_names_no_files(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(InputError, match="holds no weight_map"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../other.safetensors", "model.bin", "gone.safetensors"])
def test_a_config_that_names_no_weights_of_its_own(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": name}))
    with pytest.raises(InputError, match="transformers_weights"):
        Checkpoint(tmp_path)
    write_config(tmp_path, {"transformers_weights": name}, None)
    assert "transformers_weights" not in json.loads((tmp_path / "config.json").read_text())
