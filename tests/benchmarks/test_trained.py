"""Docstrings are split by file, always alike."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks import trained


def test_a_file_belongs_to_one_text_always() -> None:
    names = [f"torch/file{number}.py" for number in range(4000)]
    counts = Counter(map(trained.part, names))
    assert counts == Counter(map(trained.part, names))
    assert set(counts) == {"training", "calibration", "heldout"}
    for name in ("calibration", "heldout"):
        assert counts[name] == pytest.approx(len(names) / trained.HELD, rel=0.25)


def test_docstrings_are_long_enough_and_none_is_of_a_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = ("Some words about it. " * trained.SHORTEST).strip()
    files = {
        "a.py": f'"""{text}"""\ndef f():\n    """Short."""\nclass C:\n    """C. {text}"""\n',
        "test_a.py": f'"""{text}"""\n',
        "broken.py": f'"""{text}"""\ndef\n',
        "site-packages/b.py": f'"""{text}"""\n',
    }
    for name, content in files.items():
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    monkeypatch.setattr(trained, "PACKAGES", ())
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path / "lib")})
    assert list(trained.docstrings()) == [("lib/a.py", text), ("lib/a.py", f"C. {text}")]


def test_the_tokenizer_gives_text_back() -> None:
    tokenizer = trained.build_tokenizer(["def f(x):\n    return x\n", "naïve café"] * 20)
    text = "def g(naïve):\n    return café"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == trained.END and tokenizer(trained.END)["input_ids"] == [0]


@pytest.mark.parametrize("name", trained.MODELS)
def test_models_have_the_size_that_they_are_named_for(name: str) -> None:
    with torch.device("meta"):
        model = trained.MODELS[name]()
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert f"{millions:.0f}m" == name.rpartition("-")[2]


def test_a_mixture_learns_to_use_its_experts_alike() -> None:
    """The balance of the experts is part of the loss where the configuration asks for it."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=16,
        hidden_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=1,
        norm_topk_prob=False,
    )
    script: Any = trained  # which has ``train`` from the demo
    documents = [([1, 2, 3, 4] * 80, [0.0, 1.0] * 160)]
    changed = []
    for balanced in (False, True):
        torch.manual_seed(0)
        config.output_router_logits, config.router_aux_loss_coef = balanced, 100.0
        model: Any = Qwen3MoeForCausalLM(config)
        before = model.model.layers[0].mlp.gate.weight.clone()
        script.train(model, documents, steps=3, rows=1, peak=1e-2)
        changed.append((model.model.layers[0].mlp.gate.weight - before).detach())
    assert not torch.allclose(changed[0], changed[1], atol=1e-6)
