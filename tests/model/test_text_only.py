"""--text-only: the text model of a wrapper gives the logits that the whole gives for text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.base.errors import CheckpointWarning, InputError
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.packed import open_artifact
from quantkit.lora.open import open_baseline
from quantkit.model.skeleton import Skeleton
from quantkit.model.stream import Stream, slices
from quantkit.model.text_only import TextOnly
from quantkit.model.tying import settle_tying
from tests.helpers.tiny import Tiny

RECIPE = """\
schema: 1
name: r
version: 1.0.0
quantize: {method: rtn, bits: 4, group_size: 16, symmetric: true, format: compressed-tensors}
"""
TIE = "tie_word_embeddings"
ROWS = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(0))


def streamed(checkpoint: Checkpoint) -> torch.Tensor:
    stream = Stream(Skeleton(checkpoint, torch.float32), checkpoint, torch.device("cpu"))
    [batch] = stream.begin(ROWS, 2)
    for index in range(len(stream.skeleton.layers)):
        with stream.block(index) as block:
            stream.advance(index, block, [batch])
    with stream.head() as logits:
        return torch.cat([logits(batch, part) for part in slices(stream.vocabulary)], -1)


def with_prediction_heads(directory: Path) -> Path:
    """Heads for more than one token, which transformers knows and doesn't load."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "mtp.fc.weight": torch.ones(4, 4)}, file, metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("model_type", ["qwen3_5_moe", "mistral3", "internvl", "smolvlm"])
def test_text_gives_the_same_logits(model_type: str, tiny: Tiny) -> None:
    whole = Checkpoint(tiny(model_type))
    text = TextOnly(whole)
    assert torch.equal(streamed(text), streamed(whole))
    assert len(text.entries) + len(text.left_out) == len(whole.entries)
    assert not [key for key in text.left_out if "language_model" in key or "text_model" in key]


def test_the_artifact_is_a_text_model(tiny: Tiny, tmp_path: Path) -> None:
    directory = with_prediction_heads(tiny("qwen3_5"))
    (directory / "preprocessor_config.json").write_text("{}")
    (tmp_path / "r.yaml").write_text(RECIPE)
    out = tmp_path / "out"
    manifest = quantkit.quantize(tmp_path / "r.yaml", model=directory, out=out, text_only=True)
    assert manifest.tensors is not None
    towers = [key for key in Checkpoint(directory).entries if "visual" in key]
    assert manifest.tensors.left_out.count == len(towers)
    assert manifest.tensors.unused.names == ("mtp.fc.weight",)
    assert not (out / "preprocessor_config.json").exists()
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["Qwen3_5ForCausalLM"] and "vision_config" not in config
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert type(model).__name__ == "Qwen3_5ForCausalLM"
    # Judged against the text model, whose keys the artifact has.
    baseline = open_baseline(str(directory), (), [out])
    assert isinstance(baseline, TextOnly)
    skeleton = Skeleton(baseline, weights=open_artifact(out))
    assert "model.layers.0.mlp.up_proj.weight" in skeleton.names.values()


def test_an_output_embedding_that_a_tied_config_hides(tiny: Tiny) -> None:
    """Engines go by the config: one that ties would leave out the stored output embedding."""
    directory = tiny("mistral3", tie_word_embeddings=True)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors and TextOnly(Checkpoint(directory)).config[TIE] is True
    head = torch.randn(96, 64, generator=torch.Generator().manual_seed(1))
    save_file({**tensors, "lm_head.weight": head}, file, metadata={"format": "pt"})
    whole = Checkpoint(directory)
    with pytest.warns(CheckpointWarning, match="both count"):
        settle_tying(whole)
    text = TextOnly(whole)
    assert text.config[TIE] is False and "lm_head.weight" in text.entries
    assert torch.equal(streamed(text), streamed(whole))


def test_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="model of text alone"):
        TextOnly(Checkpoint(tiny("llama")))
    wrapper = tiny("mistral3")
    with pytest.raises(InputError, match="be folded in where images"):
        quantkit.dry_run("awq-w4-g128", model=wrapper, adapters=["x"], text_only=True)
    with pytest.raises(InputError, match="no class for the text model of Qwen3VLMoe"):
        TextOnly(Checkpoint(tiny("qwen3_vl_moe")))
    (tmp_path / "r.yaml").write_text(RECIPE)
    made = []
    for alone in (True, False):
        made.append(tmp_path / f"out-{alone}")
        quantkit.quantize(tmp_path / "r.yaml", model=wrapper, out=made[-1], text_only=alone)
    with pytest.raises(InputError, match="no baseline in common"):
        open_baseline(str(wrapper), (), made)
    assert not isinstance(open_baseline(str(wrapper), (), made[1:]), TextOnly)
