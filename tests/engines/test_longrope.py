"""phi3 with longrope: when llama.cpp computes what transformers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.chat.gguf import read_chat
from quantkit.checkpoint.reader import Checkpoint
from quantkit.commands.export import export_ollama
from quantkit.engines.llamacpp import LlamaCpp
from quantkit.formats.gguf.file import GgufPlan, plan_file
from quantkit.formats.gguf.writer import write_file
from tests.helpers.gguf_tiny import VOCABULARY, checkpoint

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

ORIGINAL, LARGEST = 512, 2048
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "long_factor": [1.0 + index / 2 for index in range(32)],
    "short_factor": [1.0 + index / 64 for index in range(32)],
}


def model(directory: Path, **changes: Any) -> Path:
    config = {
        **{"max_position_embeddings": LARGEST, "original_max_position_embeddings": ORIGINAL},
        **{"pad_token_id": 0, "num_hidden_layers": 1, "rope_parameters": LONGROPE},
    }
    return checkpoint(directory, dtype=torch.float32, model_type="phi3", **{**config, **changes})


def written(directory: Path) -> tuple[GgufPlan, Path]:
    source = Checkpoint(directory)
    plan = plan_file(source, "f32")
    write_file(directory / "model.gguf", plan, source)
    return plan, directory / "model.gguf"


def divergence(directory: Path, path: Path, *, tokens: int, context: int) -> float:
    """KL divergence of llama.cpp's next-token distribution from transformers', in nats."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY - 200, (tokens,), generator=generator)
    with torch.inference_mode():
        expected = reference(ids[None]).logits[0, -1].log_softmax(-1)
    with LlamaCpp(path, threads=1, context=context) as engine:
        got = torch.tensor(engine.log_probabilities(ids.tolist()))
    return float((expected.exp() * (expected - got)).sum())


def test_the_context_decides_which_factors_llama_cpp_takes(tmp_path: Path) -> None:
    directory = model(tmp_path)
    plan, path = written(directory)
    for tokens, context in ((16, ORIGINAL), (400, ORIGINAL), (600, 1024)):
        assert divergence(directory, path, tokens=tokens, context=context) < 1e-3
    assert divergence(directory, path, tokens=400, context=1024) > 1e-2
    [note] = plan.notes
    assert note.startswith("longrope: once its context is over 512 tokens, llama.cpp takes")
    assert "(-c 512)" in note


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {**LONGROPE, "factor": 32.0}},
        {"rope_parameters": {**LONGROPE, "attention_factor": 1.7}},
        {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 1024}},
    ],
)
def test_settings_count_as_in_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    directory = model(tmp_path, **changes)
    _, path = written(directory)
    assert divergence(directory, path, tokens=100, context=ORIGINAL) < 1e-3
    assert divergence(directory, path, tokens=700, context=1024) < 1e-3


def test_a_modelfile_opens_the_short_context(tmp_path: Path) -> None:
    directory = model(tmp_path / "model")
    _, path = written(directory)
    assert (read_chat(path).context, read_chat(path).short_context) == (LARGEST, ORIGINAL)
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    path.rename(artifact / path.name)
    assert "PARAMETER num_ctx 512" in export_ollama(artifact).path.read_text()


def test_without_longrope_nothing_is_noted(tmp_path: Path) -> None:
    for name, changes in (
        ("default", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
        ("short", {"max_position_embeddings": ORIGINAL}),
    ):
        directory = model(tmp_path / name, **changes)
        assert plan_file(Checkpoint(directory), "f32").notes == ()
