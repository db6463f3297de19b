"""Costs, measured in processes of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantkit.base.progress import Silent
from quantkit.base.resources import demo_model
from quantkit.checkpoint.reader import Checkpoint
from quantkit.commands.bench import measure_costs
from quantkit.results.cost import Load
from tests.helpers.cli import run
from tests.helpers.present import present
from tests.helpers.tiny import build


def test_costs_are_measured_in_fresh_processes(artifacts: dict[str, Path]) -> None:
    load = Load(prompt_tokens=16, new_tokens=4, repeats=1, threads=1)
    names = ["gptq-w4-g128", "gguf-q4-k-m"]
    costs = measure_costs(
        [artifacts[name] for name in names], Checkpoint(demo_model()), load, Silent()
    )
    assert [cost.engine for cost in costs.artifacts] == ["quantkit-int4", "llama.cpp"]
    baseline, gguf = present(costs.baseline), present(costs.baseline_gguf)
    assert (baseline.engine, gguf.engine) == ("transformers", "llama.cpp")
    weights = []
    for cost in (baseline, gguf, *costs.artifacts):
        assert cost.missing == {}
        weights.append(present(cost.weights_bytes))
        assert weights[-1] <= present(cost.resident_bytes) <= present(cost.peak_bytes)
        for figure in ("prefill_tokens_per_second", "decode_tokens_per_second", "ttft_ms"):
            assert getattr(cost, figure) > 0
    assert weights[2] < 0.5 * weights[0] and weights[3] < 0.5 * weights[1]


def test_an_engine_that_is_missing_leaves_its_figures_empty(
    artifacts: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocked = tmp_path / "xllamacpp.py"
    blocked.write_text("raise ImportError('blocked')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    load = Load(prompt_tokens=4, new_tokens=2, repeats=1, threads=1)
    costs = measure_costs([artifacts["gguf-q8-0"]], None, load, Silent())
    (cost,) = costs.artifacts
    assert cost.decode_tokens_per_second is None
    assert "xllamacpp" in cost.missing["all figures"]


def test_a_load_that_a_model_has_no_room_for_is_a_reason(tmp_path: Path) -> None:
    changes: dict[str, object] = {"rotary_dim": 8, "max_position_embeddings": 40}
    model = build("gptj", tmp_path / "model", dtype=torch.float32, **changes)
    sizes = ("--repeats", 1, "--new-tokens", 8, "--prompt-tokens")
    done = run("bench", model, *sizes, 34)
    assert done.exit_code == 0, done.output
    assert "34 tokens and 8 new ones don't fit in the model's 40 positions" in done.stderr
    assert "Missing" not in run("bench", model, *sizes, 33).stderr
