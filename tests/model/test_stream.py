"""The streamed forward is the full model's, bit for bit."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit.checkpoint.reader import Checkpoint
from quantkit.model.skeleton import Skeleton
from quantkit.model.stream import Stream
from tests.helpers.tiny import ARCHITECTURES, Tiny


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_logits_equal_the_full_models(
    tiny: Tiny, model_type: str, dtype: torch.dtype
) -> None:
    directory = tiny(model_type, dtype)
    rows = torch.randint(0, 96, (3, 24), generator=torch.Generator().manual_seed(1))
    full = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    checkpoint = Checkpoint(directory)
    stream = Stream(Skeleton(checkpoint), checkpoint, torch.device("cpu"))
    batches = stream.begin(rows, batch_size=2)
    for index in range(len(stream.skeleton.layers)):
        with stream.block(index) as block:
            stream.advance(index, block, batches)
    read = []
    full.get_output_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with stream.before_head() as before, torch.inference_mode():
        for batch in batches:
            full(input_ids=batch.ids, use_cache=False)
            assert torch.equal(before(batch, batch.hidden), read[-1])
    with stream.head() as logits, torch.inference_mode():
        for batch in batches:
            expected = full(input_ids=batch.ids, use_cache=False).logits
            assert torch.equal(logits(batch, slice(None)), expected)
            part = logits(batch, slice(32, 64))
            torch.testing.assert_close(part, expected[..., 32:64], rtol=1e-2, atol=1e-3)


def test_only_one_block_is_in_memory(tiny: Tiny) -> None:
    checkpoint = Checkpoint(tiny("llama"))
    stream = Stream(Skeleton(checkpoint), checkpoint, torch.device("cpu"))
    with stream.block(1):
        real = {n for n, p in stream.skeleton.model.named_parameters() if not p.is_meta}
        assert real and all(name.startswith("model.layers.1.") for name in real)
    assert all(p.is_meta for p in stream.skeleton.model.parameters())


def test_rows_of_a_table_are_those_that_are_read_one_by_one(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device with memory of its own holds the rows that a text needs."""
    checkpoint = Checkpoint(tiny("gemma2"))  # whose embedding is scaled, with a row for padding
    rows = torch.tensor([[9, 3, 3, 40], [12, 9, 7, 3]])

    def embedded() -> list[torch.Tensor]:
        stream = Stream(Skeleton(checkpoint), checkpoint, torch.device("cpu"))
        return [batch.hidden for batch in stream.begin_each(rows, 1)]

    one_by_one = embedded()
    for free in (10**9, 8):  # room for the table, and none
        monkeypatch.setattr("quantkit.model.parameters.free_memory", lambda device, n=free: n)
        assert all(map(torch.equal, one_by_one, embedded()))
