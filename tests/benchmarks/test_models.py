"""The random checkpoints are reproducible, whole, and what quantkit and its peers expect."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import models
from quantkit.calibration.text import load_tokenizer, pack_rows
from quantkit.checkpoint.reader import Checkpoint


@pytest.fixture(scope="module")
def feed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.make("tiny", tmp_path_factory.mktemp("feed"))


def test_checkpoints_are_the_same_every_time(feed: Path, tmp_path: Path) -> None:
    again = models.make("tiny", tmp_path)
    for file in sorted(path.relative_to(feed) for path in feed.rglob("*.*") if path.is_file()):
        assert (feed / file).read_bytes() == (again / file).read_bytes(), file
    checkpoint = Checkpoint(feed / "model")
    assert set(checkpoint.keys()) == {name for name, _ in models.SHAPES["tiny"].tensors()}


def test_peers_get_the_rows_that_quantkit_calibrates_on(feed: Path) -> None:
    tokenizer = load_tokenizer(feed / "model")
    ours = pack_rows(models.CALIBRATION, tokenizer, sequence_length=512, rows=16, seed=0)
    assert json.loads((feed / "rows.json").read_text()) == ours.ids.tolist()


def test_parts_that_are_there_are_kept(feed: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in feed.rglob("*")}
    assert models.make("tiny", feed.parent) == feed
    assert {path: path.stat().st_mtime_ns for path in feed.rglob("*")} == before


def test_a_mixture_is_one_that_transformers_loads_whole(tmp_path: Path) -> None:
    shape = models.SHAPES["tiny-mixture"]
    models.write_model(tmp_path, shape)
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    experts = model.model.layers[1].mlp.experts
    assert (experts.num_experts, model.config.num_experts_per_tok) == (8, 2)


def test_names_tell_the_sizes() -> None:
    sizes = {
        name: sum(prod(size) for _, size in shape.tensors())
        for name, shape in models.SHAPES.items()
    }
    assert round(sizes["82m"] / 1e6) == 82
    assert round(sizes["1.1b"] / 1e8) == 11
    assert round(sizes["7b"] / 1e9) == 7
    assert round(sizes["2b-8"] / 1e8) == 20
    assert sizes["mixture-8"] - 2 * 32000 * 2048 == pytest.approx(8 * 64 * 3 * 768 * 2048, rel=0.05)
    assert models.SHAPES["1.1b-deep"].layers == 2 * models.SHAPES["1.1b"].layers


def test_a_tensor_is_drawn_in_slices_and_has_loud_channels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "model.embed_tokens.weight"
    whole = torch.cat(list(models.draw(name, (64, 32))))
    monkeypatch.setattr(models, "SLICE", 5 * 32)
    parts = list(models.draw(name, (64, 32)))
    assert [len(part) for part in parts] == [5] * 12 + [4]
    assert torch.cat(parts).shape == whole.shape == (64, 32)
    spread = whole.std(0)
    assert set(spread.topk(models.LOUD_CHANNELS).indices.tolist()) == {0, 8, 16, 24}
    [norm] = models.draw("model.norm.weight", (8,))
    assert torch.equal(norm, torch.ones(8))


def test_large_models_are_written_in_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = models.Shape(2, 32, 64, 2, 1, 128)
    monkeypatch.setattr(models, "SHARD_BYTES", 20_000)
    models.write_model(tmp_path, shape)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = {path.name for path in tmp_path.glob("*.safetensors")}
    assert len(files) > 1 and files == set(index["weight_map"].values())
    expected = dict(shape.tensors())
    assert set(index["weight_map"]) == set(expected)
    checkpoint = Checkpoint(tmp_path)
    assert {key: tuple(checkpoint.read(key).shape) for key in checkpoint.keys()} == expected  # noqa: SIM118
    assert index["metadata"]["total_size"] == sum(2 * prod(size) for size in expected.values())


def test_an_interrupted_part_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "part"
    with pytest.raises(KeyboardInterrupt), models.missing(path) as directory:
        assert directory is not None
        (directory / "half").touch()
        raise KeyboardInterrupt
    assert not path.exists()
    with models.missing(path) as directory:
        assert directory is not None and not list(directory.iterdir())
    with models.missing(path) as directory:
        assert directory is None
