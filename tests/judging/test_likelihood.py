"""Likelihoods streamed in slices equal those of whole models with whole logits."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.special import stdtrit
from transformers import AutoModelForCausalLM

import quantkit.judging.likelihood as likelihood
from quantkit.checkpoint.reader import Checkpoint
from quantkit.judging.intervals import with_intervals
from quantkit.model.skeleton import Skeleton
from quantkit.model.stream import Stream
from tests.helpers.tiny import Tiny


class Noisy:
    """A checkpoint with a little noise on one matrix: a stand-in for an artifact."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def keys(self) -> Iterable[str]:
        return self.checkpoint.keys()

    def read(self, key: str) -> torch.Tensor:
        tensor = self.checkpoint.read(key)
        if key.endswith("down_proj.weight"):
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
            tensor = tensor + 0.02 * noise
        return tensor

    def read_rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        return self.read(key)[start:stop]


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_equal_to_the_whole_model(
    tiny: Tiny, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny(model_type)
    rows = torch.randint(0, 96, (6, 20), generator=torch.Generator().manual_seed(2))
    checkpoint = Checkpoint(directory)
    device = torch.device("cpu")
    monkeypatch.setattr(
        likelihood, "slices", lambda n, size: [slice(i, min(i + 40, n)) for i in range(0, n, 40)]
    )
    sides = [
        likelihood.final_states(Stream(Skeleton(checkpoint), source, device), rows)
        for source in (checkpoint, Noisy(checkpoint))
    ]
    result = likelihood.compare_predictions(sides[0], sides[1])

    models = [AutoModelForCausalLM.from_pretrained(directory).eval() for _ in range(2)]
    noisy = Noisy(checkpoint)
    with torch.inference_mode():
        for name, parameter in models[1].named_parameters():
            if name.endswith("down_proj.weight"):
                parameter.copy_(noisy.read(name))
        logs = [m(rows).logits[:, :-1].double().log_softmax(-1) for m in models]
    labels = rows[:, 1:, None]
    expected_kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
    torch.testing.assert_close(result.kl, expected_kl, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(result.baseline_nll, -logs[0].gather(-1, labels)[..., 0])
    torch.testing.assert_close(result.nll, -logs[1].gather(-1, labels)[..., 0])
    assert torch.equal(result.agrees, logs[0].argmax(-1) == logs[1].argmax(-1))

    kl = result.kl_divergence()
    means = expected_kl.mean(1)
    half = stdtrit(5, 0.975) * means.std().item() / math.sqrt(6)  # no end within Student's t
    assert kl.mean == pytest.approx(means.mean().item(), rel=1e-5)  # float32 exponentials
    interval = with_intervals(result.quality("float32")).kl_interval
    assert interval is not None
    assert 0 < interval.low <= (kl.mean - half) * (1 + 1e-5)
    assert (kl.mean + half) * (1 - 1e-5) <= interval.high < 1
    assert kl.p99 == pytest.approx(torch.quantile(expected_kl.flatten(), 0.99).item(), rel=1e-4)
    perplexity = result.perplexity()
    assert perplexity.value == pytest.approx((-logs[1].gather(-1, labels)).mean().exp().item())
    assert perplexity.ratio == pytest.approx(perplexity.value / result.baseline_perplexity().value)
    assert 0 < kl.mean < 1 and perplexity.stderr > 0


def test_a_model_against_itself_has_no_divergence(tiny: Tiny) -> None:
    checkpoint = Checkpoint(tiny("llama"))
    rows = torch.randint(0, 96, (4, 20))
    side = likelihood.final_states(
        Stream(Skeleton(checkpoint), checkpoint, torch.device("cpu")), rows
    )
    result = likelihood.compare_predictions(side, side)
    assert result.kl_divergence().p99 < 1e-12
    assert result.top1_agreement() == 1 and result.perplexity().ratio == 1


@pytest.mark.parametrize(
    ("gigabytes", "tokens", "columns"), [(2, 2048, 4096), (8, 8192, 4096), (80, 8192, 16384)]
)
def test_a_gpu_takes_more_at_once_by_the_memory_that_it_has(
    monkeypatch: pytest.MonkeyPatch, gigabytes: int, tokens: int, columns: int
) -> None:
    memory = SimpleNamespace(total_memory=gigabytes << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert likelihood.tokens_per_batch(cuda) == tokens
    assert likelihood.columns_per_slice(cuda) == columns
    assert likelihood.tokens_per_batch(cpu) == likelihood.columns_per_slice(cpu) == 2048


def test_no_slice_waits_for_a_number(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tiny("llama"))
    rows = torch.randint(0, 96, (4, 20), generator=torch.Generator().manual_seed(3))
    sides = [
        likelihood.final_states(Stream(Skeleton(checkpoint), source, torch.device("cpu")), rows)
        for source in (checkpoint, Noisy(checkpoint))
    ]
    waits: list[str] = []
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)

        def wait(tensor: torch.Tensor, name: str = name, original: Any = original) -> Any:
            if sys._getframe(1).f_code.co_filename == likelihood.__file__:  # not transformers'
                waits.append(name)
            return original(tensor)

        monkeypatch.setattr(torch.Tensor, name, wait)
    found = []
    for columns in (96, 8):
        monkeypatch.setattr(likelihood, "columns_per_slice", lambda device, n=columns: n)
        waits.clear()
        figures = likelihood.compare_predictions(sides[0], sides[1])
        found.append((figures, list(waits)))
    (whole, few), (sliced, many) = found
    assert few == many == ["cpu"] * 4  # the figures, at the end
    torch.testing.assert_close(sliced.kl, whole.kl, rtol=1e-4, atol=1e-8)  # float32
    torch.testing.assert_close(sliced.nll, whole.nll)
    assert torch.equal(sliced.agrees, whole.agrees)
