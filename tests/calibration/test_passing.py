"""Inputs of every linear, in the quantized and the unquantized model side by side."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from quantkit.assembly import blocks, gguf
from quantkit.base.progress import Silent
from quantkit.calibration import passing
from quantkit.calibration.needs import Needs
from quantkit.calibration.passing import CalibrationPass
from quantkit.calibration.replay import Replay
from quantkit.calibration.text import Rows
from quantkit.checkpoint.reader import Checkpoint
from quantkit.commands.quantize import prepare, quantize
from quantkit.formats.packed import open_artifact
from quantkit.model.skeleton import Skeleton
from quantkit.model.stream import Batch, Stream
from quantkit.recipes.recipe import load_recipe
from tests.helpers.blocks import first_block
from tests.helpers.gguf_tiny import MODELS, TEXT, checkpoint
from tests.helpers.present import present
from tests.helpers.tiny import ARCHITECTURES, Tiny


def read(model: nn.Module, name: str, ids: torch.Tensor) -> torch.Tensor:
    """What the linear ``name`` of a whole model reads, (tokens, width)."""
    seen = []
    linear = model.get_submodule(name)
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    return seen[0].flatten(0, -2).float()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_both_models_inputs_are_those_of_the_whole_models(tiny: Tiny, model_type: str) -> None:
    """Every linear is quantized as soon as its input is known, here to 64ths."""
    directory = tiny(model_type)
    ids = torch.randint(0, 96, (4, 16), generator=torch.Generator().manual_seed(5))
    checkpoint = Checkpoint(directory)
    skeleton = Skeleton(checkpoint)
    stream = Stream(skeleton, checkpoint, torch.device("cpu"))
    calibration = CalibrationPass(
        stream, Rows(ids, "", len(ids)), Needs("gram", propagate="corrected")
    )
    original = AutoModelForCausalLM.from_pretrained(directory, dtype=skeleton.model.dtype).eval()
    changed = copy.deepcopy(original)
    done = 0
    for index in range(len(skeleton.layers)):
        with stream.block(index) as block:
            for group in calibration.corrected(index, block, lambda: None):
                names = [f"{skeleton.layer_name(index)}.{name}" for name in group.consumers]
                x, y = read(original, names[0], ids), read(changed, names[0], ids)
                atol = 1e-3 * float(y.square().sum())
                torch.testing.assert_close(group.moment.matrix(), y.t() @ y, rtol=1e-3, atol=atol)
                # The drift may be in bfloat16.
                drift = present(group.drift).float()
                torch.testing.assert_close(drift, (x - y).t() @ y, rtol=5e-3, atol=atol)
                if index:
                    assert (x - y).norm() > 1e-3 * y.norm()
                for name, consumer in zip(names, group.consumers, strict=True):
                    value = (changed.get_submodule(name).weight.data * 64).round() / 64
                    changed.get_submodule(name).weight.data = value
                    block.get_submodule(consumer).weight.data = value.clone()
                    done += 1
    assert done == sum(len(skeleton.linears(index)) for index in range(len(skeleton.layers)))


def measured(directory: Path) -> list[torch.Tensor]:
    """All moments and drifts of a model whose weights are rounded to 64ths."""
    ids = torch.randint(0, 96, (3, 16), generator=torch.Generator().manual_seed(5))
    checkpoint = Checkpoint(directory)
    stream = Stream(Skeleton(checkpoint), checkpoint, torch.device("cpu"))
    calibration = CalibrationPass(stream, Rows(ids, "", 3), Needs("gram", propagate="corrected"))
    found: list[torch.Tensor] = []
    for index in range(len(stream.skeleton.layers)):
        with stream.block(index) as block:
            for group in calibration.corrected(index, block, lambda: None):
                found += [group.moment.matrix(), present(group.drift)]
                for consumer in group.consumers:
                    weight = block.get_parameter(f"{consumer}.weight")
                    weight.data = (weight.data * 64).round() / 64
    return found


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_what_is_not_computed_again_changes_nothing(
    tiny: Tiny, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passing, "_TOKENS_PER_BATCH", 16)  # so that there are several
    found = measured(tiny(model_type))
    monkeypatch.setattr(Replay, "keep", lambda self, linears, read: False)
    whole = measured(tiny(model_type))
    assert len(found) == len(whole) >= 12
    assert all(map(torch.equal, found, whole))


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "olmo2", "qwen3"])
def test_rows_go_on_through_what_the_gguf_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """Its weights, in the checkpoint's order of rows, whether error feedback made them or not."""
    changes = {**MODELS[model_type], "tie_word_embeddings": model_type in ("olmo2", "qwen3")}
    model = checkpoint(tmp_path / "model", model_type=model_type, **changes)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXT * 30), encoding="utf-8")
    settings = [
        "quantize.propagate=corrected",
        "quantize.overrides=[{match: blk.0.ffn_down.weight, type: F16}]",
        f"calibration={{dataset: {text}, samples: 4, sequence_length: 32}}",
    ]
    given: list[tuple[str, torch.Tensor]] = []
    original = blocks.put

    def noting(block: nn.Module, name: str, value: torch.Tensor) -> None:
        given.append((name, value))
        original(block, name, value)

    def begin_each(
        stream: Stream,
        rows: torch.Tensor,
        size: int,
        embedding: Callable[[int, int], torch.Tensor] | None = None,
    ) -> Iterator[Batch]:
        if embedding is not None:
            begun.append(embedding(3, 40))
        return begin(stream, rows, size, embedding)

    monkeypatch.setattr(gguf, "put", noting)
    begun: list[torch.Tensor] = []
    begin = Stream.begin_each
    monkeypatch.setattr(Stream, "begin_each", begin_each)
    job = prepare(load_recipe("gguf-q4-k-m-gptq", settings), str(model))
    quantize(job, tmp_path / "out", device="cpu", force=False, progress=Silent(), cache=False)
    artifact, skeleton = open_artifact(tmp_path / "out"), Skeleton(Checkpoint(model))
    [embedded] = begun
    name = next(name for name, m in skeleton.model.named_modules() if isinstance(m, nn.Embedding))
    assert torch.equal(artifact.read(skeleton.key(f"{name}.weight"))[3:40], embedded)
    names = [list(skeleton.linears(index)) for index in range(2)]
    assert len(given) == sum(map(len, names)) >= 8
    for place, (name, value) in enumerate(given):
        key = skeleton.key(f"{skeleton.layer_name(int(place >= len(names[0])))}.{name}")
        assert torch.equal(artifact.read(key), value), key


def test_linears_that_read_one_tensor_share_one_gram_matrix(tiny: Tiny) -> None:
    _, inputs, _, _ = first_block(tiny("llama"))
    assert [group.consumers for group in inputs] == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]
    assert all(group.tokens == 8 * 32 for group in inputs)
    for group in inputs:
        gram = group.moment.matrix()
        assert torch.allclose(gram, gram.t(), rtol=1e-4, atol=1e-3)
        assert torch.allclose(gram.diagonal(), group.moment.diagonal(), rtol=1e-4)
