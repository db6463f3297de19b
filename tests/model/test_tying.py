"""A config that ties two different matrices: the model that transformers runs is the oracle."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quantkit.base.errors import CheckpointWarning
from quantkit.base.resources import demo_model
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.packed import open_artifact
from quantkit.model.skeleton import Skeleton
from quantkit.model.tying import settle_tying
from tests.helpers.adapters import load, merged_by_peft, train
from tests.helpers.cli import run
from tests.helpers.tiny import COMMON, Tiny

SAID = "holds both with different values"


def with_head(base: Path, directory: Path, factor: float) -> Path:
    """A copy of a tied checkpoint that also holds an output matrix: ``factor`` embeddings."""
    shutil.copytree(base, directory)
    tensors = load_file(directory / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(base)
    [head] = [n for n, m in model.named_modules() if m is model.get_output_embeddings()]
    tensors[f"{head}.weight"] = model.get_input_embeddings().weight.detach() * factor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("factor", [2, 1])
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("qwen3", {}),
        ("gpt_neox", {"tie_word_embeddings": True}),
        ("bloom", {}),
        ("opt", {}),
        (
            "gemma3",
            {
                "text_config": COMMON | {"num_key_value_heads": 2, "head_dim": 16},
                "vision_config": {
                    **{"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1},
                    **{"num_attention_heads": 2, "image_size": 16, "patch_size": 8},
                },
                "mm_tokens_per_image": 4,
            },
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_config_is_untied_where_transformers_doesnt_tie(
    tiny: Tiny, tmp_path: Path, model_type: str, changes: dict[str, Any], factor: int
) -> None:
    directory = with_head(tiny(model_type, **changes), tmp_path / "model", factor)
    oracle = AutoModelForCausalLM.from_pretrained(directory)
    apart = oracle.get_output_embeddings().weight is not oracle.get_input_embeddings().weight
    assert apart == (factor != 1)
    checkpoint = Checkpoint(directory)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", CheckpointWarning)
        settle_tying(checkpoint)
    assert [SAID in str(w.message) for w in told if w.category is CheckpointWarning] == (
        [True] if apart else []
    )
    (directory / "config.json").write_text(json.dumps(checkpoint.config))
    model = Skeleton(Checkpoint(directory)).model
    assert bool(model.all_tied_weights_keys) == (not apart)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_head(demo_model(), tmp_path_factory.mktemp("tied") / "demo", 1.5)


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("nf4", []),
        ("rtn-w4-g128", ["quantize.bits=8", "quantize.format=gptq"]),
        ("rtn-w4-g128", ["quantize.format=awq", "quantize.symmetric=false"]),
        ("rtn-w4-g128", ["quantize.format=compressed-tensors"]),
        ("gguf-q8-0", []),
    ],
    ids=["nf4", "gptq", "awq", "compressed-tensors", "gguf"],
)
def test_every_format_keeps_both(
    demo: Path, tmp_path: Path, recipe: str, settings: list[str]
) -> None:
    out = tmp_path / "out"
    options = [word for setting in settings for word in ("--set", setting)]
    result = run("quantize", recipe, "--model", demo, "--out", out, *options)
    assert result.exit_code == 0, result.output
    assert " ".join(result.stderr.split()).count(SAID) == 1
    oracle = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)
    artifact = open_artifact(out)
    head = artifact.read("lm_head.weight").float()
    error = (head - oracle.lm_head.weight).norm() / oracle.lm_head.weight.norm()
    assert error < 0.01  # Q8_0's
    assert (artifact.read("model.embed_tokens.weight").float() - head).abs().max() > 0.01
    if recipe.startswith("gguf"):
        assert "output.weight" in str(artifact.header.entries)  # type: ignore[attr-defined]
        return
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    ids = torch.arange(20, 60)[None]
    skeleton = Skeleton(Checkpoint(out), weights=artifact)
    model = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)
    model.load_state_dict({n: artifact.read(k).float() for n, k in skeleton.names.items()})
    expected, actual = (m(input_ids=ids).logits.log_softmax(-1) for m in (oracle, model))
    assert ((expected.exp() * (expected - actual)).sum(-1).mean()) < 0.3


def test_merge_unties_too(demo: Path, tmp_path: Path) -> None:
    adapter = train(demo, tmp_path / "a", {"target_modules": ["q_proj"], "r": 4})
    result = run("merge", demo, adapter, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert " ".join(result.stderr.split()).count(SAID) == 1
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    oracle = merged_by_peft(load(demo), adapter)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, tensor in found.state_dict().items():
        assert (tensor - oracle[name]).abs().max() <= 4e-3 * oracle[name].abs().max(), name
