"""The text model within models of images and text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.base.errors import InputError
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.gguf.file import plan_file
from quantkit.formats.gguf.reader import GgufWeights
from quantkit.formats.gguf.writer import write_bf16
from quantkit.model.skeleton import Skeleton
from quantkit.model.text_only import TextOnly
from tests.helpers.gguf_tiny import WRAPPED, checkpoint

pytest.importorskip("gguf")


@pytest.mark.parametrize("model_type", WRAPPED)
def test_the_text_model_of_a_wrapper(tmp_path: Path, model_type: str) -> None:
    source = Checkpoint(checkpoint(tmp_path, model_type=model_type))
    plan = plan_file(source, "bf16")
    keys = [part.key for part in plan.parts if part.key is not None]
    stored = {plan.views[key].key if key in plan.views else key for key in keys}
    assert stored | set(plan.left_out) == set(source.entries)
    assert plan.left_out and not stored & set(plan.left_out)
    assert f"left out: {len(plan.left_out)} tensors of" in plan.notes[0]
    assert "--mmproj" in plan.notes[0]
    write_bf16(tmp_path / "model.gguf", source)
    weights = GgufWeights(tmp_path / "model.gguf")
    names = Skeleton(source, weights=weights).names
    whole, viewed = Skeleton(source).names, plan.viewed(source)
    assert set(names.values()) == set(weights.keys())
    for name, key in names.items():
        # Norms of 1 + w lose what float32 doesn't hold beside the 1.
        given = viewed.read(whole[name]).float()
        torch.testing.assert_close(weights.read(key), given, rtol=0, atol=1e-7)


def test_a_tensor_of_no_model_is_refused(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, model_type="qwen3_vl")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.language_model.extra.weight"] = torch.zeros(2, 2)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"extra\.weight"):
        plan_file(Checkpoint(directory), "bf16")


def test_a_text_model_alone_makes_the_same_file(tmp_path: Path) -> None:
    source = Checkpoint(checkpoint(tmp_path, model_type="mistral3"))
    whole, alone = plan_file(source, "q4_k_m"), plan_file(TextOnly(source), "q4_k_m")
    assert whole.metadata == alone.metadata
    assert [t.name for t in whole.tensors] == [t.name for t in alone.tensors]
    assert alone.left_out == ()
