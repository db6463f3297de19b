"""Decoding by replayed steps, with a stand-in for CUDA graphs where there is no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import quantkit
from quantkit.base.progress import Silent
from quantkit.base.resources import demo_model
from quantkit.checkpoint.reader import Checkpoint
from quantkit.commands.bench import measure_costs
from quantkit.engines.graphs import NoGraph, Step, decode_seconds
from quantkit.model.build import class_of
from quantkit.results.cost import Load
from tests.helpers.present import present
from tests.helpers.tiny import build

PROMPTS = torch.arange(1, 13).view(2, 6)


def model_at(directory: Path) -> Any:
    return class_of(directory).from_pretrained(directory, dtype=torch.float32).eval()


def run_again(begin: Step, step: Step) -> Step:
    """Stands in for a graph: what a replay would do, done by the step itself."""
    begin()
    step()
    return step


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return model_at(
        build("llama", tmp_path_factory.mktemp("graphs") / "model", dtype=torch.float32)
    )


def test_every_new_token_but_the_first_is_a_replay(llama: Any) -> None:
    replays = []

    def counted(begin: Step, step: Step) -> Step:
        def replay() -> None:
            replays.append(1)
            step()

        return replay

    assert decode_seconds(llama, PROMPTS, 5, 3, counted) > 0
    assert len(replays) == 1 + 4 + 3 * 4  # the comparison, the warm-up, the timed runs


def test_replays_answer_as_a_loop_with_a_growing_cache(llama: Any) -> None:
    """The figures are of the same work: the tokens are those of transformers' own decoding."""
    tokens: list[list[int]] = []

    def listened(begin: Step, step: Step) -> Step:
        def forward(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            if kwargs["input_ids"].shape[1] > 1:
                tokens.clear()
            tokens.append(output.logits[:, -1].argmax(-1).tolist())

        llama.register_forward_hook(forward, with_kwargs=True)
        return step

    decode_seconds(llama, PROMPTS, 6, 1, listened)
    llama._forward_hooks.clear()
    made = llama.generate(PROMPTS, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.tensor(tokens).t().tolist() == made[:, PROMPTS.shape[1] :].tolist()


@pytest.mark.parametrize("fault", ["a step that is lost", "other logits"])
def test_a_replay_that_does_something_else_gives_no_figure(llama: Any, fault: str) -> None:
    def broken(begin: Step, step: Step) -> Step:
        if fault == "a step that is lost":
            return lambda: None
        weight = llama.lm_head.weight.data

        def replay() -> None:
            weight.neg_()
            step()
            weight.neg_()

        return replay

    reason = "tokens are in the cache" if fault == "a step that is lost" else "other logits"
    with pytest.raises(NoGraph, match=reason):
        decode_seconds(llama, PROMPTS, 4, 1, broken)


def test_windows_that_slide_are_refused(tmp_path: Path) -> None:
    """Whether a window is full is decided in Python, which a replay would skip."""
    model = model_at(build("gemma2", tmp_path / "model", dtype=torch.float32))
    with pytest.raises(NoGraph, match="aren't replayed"):
        decode_seconds(model, PROMPTS, 4, 1, run_again)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_costs_on_a_gpu_have_decoding_with_graphs_and_without(tmp_path: Path) -> None:
    load = Load(prompt_tokens=16, new_tokens=8, repeats=2, device="cuda")
    paths = [tmp_path / name for name in ("gptq-w4-g128", "awq-w4-g128")]
    for path in paths:
        quantkit.quantize(path.name, model="demo", out=path, device="cuda", cache=False)
    costs = measure_costs(paths, Checkpoint(demo_model()), load, Silent())
    for cost in (present(costs.baseline), *costs.artifacts):
        assert cost.missing == {} and cost.device.startswith("cuda")
        assert present(cost.device_peak_bytes) >= present(cost.weights_bytes)
        plain = present(cost.decode_tokens_per_second)
        assert present(cost.decode_tokens_per_second_graphs) > plain
        assert present(cost.decode_tokens_per_second_batch8_graphs) > plain
    assert {cost.engine for cost in costs.artifacts} == {"quantkit-int4"}
