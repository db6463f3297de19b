"""Weights are those that a model computes with, whatever it stores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.foreign_jobs import weights
from tests.helpers.tiny import Tiny


class Packed(nn.Module):
    """A linear of a peer: codes and a scale, the other name for its inputs, and a bias."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.infeatures = linear.in_features
        self.scale = linear.weight.detach().abs().max() / 127
        self.codes = (linear.weight.detach() / self.scale).round()
        self.bias = torch.arange(linear.out_features, dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.codes * self.scale).t() + self.bias


@pytest.fixture
def original(tiny: Tiny) -> Path:
    return tiny("llama")


def test_packed_linears_are_read_by_what_they_compute(original: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    attention = model.model.layers[1].self_attn
    attention.q_proj = packed = Packed(attention.q_proj)
    out = tmp_path / "weights"
    weights.save(model, original, out, torch.float32)
    written, source = (load_file(path / "model.safetensors") for path in (out, original))
    assert written.keys() == source.keys()
    name = "model.layers.1.self_attn.q_proj.weight"
    torch.testing.assert_close(written.pop(name), packed.codes * packed.scale)
    for key, value in written.items():
        assert torch.equal(value, source[key]), key
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float32"
    AutoModelForCausalLM.from_pretrained(out)


def test_figures_are_those_of_the_model_itself(original: Path, tmp_path: Path) -> None:
    model, other = (AutoModelForCausalLM.from_pretrained(original).eval() for _ in range(2))
    rows = torch.randint(0, 96, (3, 12), generator=torch.Generator().manual_seed(0)).tolist()
    weights.figures(model, other, rows, tmp_path / "figures.json")
    same = json.loads((tmp_path / "figures.json").read_text())
    assert same["kl"] == pytest.approx(0, abs=1e-9) and 1 < same["perplexity"] < 1e4
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(0)
    weights.figures(model, other, rows, tmp_path / "figures.json")
    moved = json.loads((tmp_path / "figures.json").read_text())
    assert moved["perplexity"] == same["perplexity"] and moved["kl"] > 1e-6
