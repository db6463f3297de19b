"""A corrected GGUF: the drifted rows pass through the very weights that the file holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from quantkit.assembly import blocks, gguf
from quantkit.base.progress import Silent
from quantkit.checkpoint.reader import Checkpoint
from quantkit.commands.quantize import prepare, quantize
from quantkit.formats.packed import open_artifact
from quantkit.model.skeleton import Skeleton
from quantkit.model.stream import Batch, Stream
from quantkit.recipes.recipe import load_recipe
from tests.helpers.gguf_tiny import MODELS, TEXT, checkpoint


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "olmo2", "qwen3_5_text"])
def test_rows_pass_through_what_the_file_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """In the checkpoint's order of rows, whether error feedback chose the codes or ggml did."""
    changes = {**MODELS[model_type], "tie_word_embeddings": model_type in ("olmo2", "qwen3_5_text")}
    model = checkpoint(tmp_path / "model", model_type=model_type, **changes)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXT * 30), encoding="utf-8")
    settings = [
        "quantize.propagate=corrected",
        "quantize.overrides=[{match: blk.0.ffn_down.weight, type: F16}]",
        f"calibration={{dataset: {text}, samples: 4, sequence_length: 32}}",
    ]
    given: list[tuple[str, torch.Tensor]] = []  # to linears of a block
    embedded_rows: list[torch.Tensor] = []
    put, begin = blocks.put, Stream.begin_each

    def recording(block: nn.Module, name: str, value: torch.Tensor) -> None:
        given.append((name, value))
        put(block, name, value)

    def begin_each(
        stream: Stream,
        rows: torch.Tensor,
        size: int,
        embedding: Callable[[int, int], torch.Tensor] | None = None,
    ) -> Iterator[Batch]:
        if embedding is not None:
            embedded_rows.append(embedding(3, 40))
        return begin(stream, rows, size, embedding)

    monkeypatch.setattr(gguf, "put", recording)
    monkeypatch.setattr(Stream, "begin_each", begin_each)
    job = prepare(load_recipe("gguf-q4-k-m-gptq", settings), str(model))
    quantize(job, tmp_path / "out", device="cpu", force=False, progress=Silent(), cache=False)
    artifact, skeleton = open_artifact(tmp_path / "out"), Skeleton(Checkpoint(model))
    [embedded] = embedded_rows
    name = next(name for name, m in skeleton.model.named_modules() if isinstance(m, nn.Embedding))
    assert torch.equal(artifact.read(skeleton.key(f"{name}.weight"))[3:40], embedded)
    names = [list(skeleton.linears(index)) for index in range(2)]
    assert len(given) == sum(map(len, names)) >= 8
    for place, (name, value) in enumerate(given):
        key = skeleton.key(f"{skeleton.layer_name(int(place >= len(names[0])))}.{name}")
        assert torch.equal(artifact.read(key), value), key
