"""The share of tokens that are sent to other experts, against the choices of transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit.base.errors import InputError
from quantkit.checkpoint.reader import Checkpoint
from quantkit.judging import routing
from quantkit.judging.gates import check_measured
from quantkit.judging.intervals import with_intervals
from quantkit.judging.likelihood import FinalStates, compare_predictions, final_states
from quantkit.judging.significance import mean_interval
from quantkit.model.expert_layout import holds_experts
from quantkit.model.skeleton import Skeleton
from quantkit.model.stream import Stream
from quantkit.recipes.suite import load_suite
from tests.helpers.present import present
from tests.helpers.tiny import MIXTURES, Tiny

ROWS = torch.randint(3, 90, (5, 16), generator=torch.Generator().manual_seed(0))


def streamed(directory: Path, rows: Tensor = ROWS) -> FinalStates:
    checkpoint = Checkpoint(directory)
    skeleton = Skeleton(checkpoint, torch.float32)
    return final_states(Stream(skeleton, checkpoint, torch.device("cpu")), rows)


def perturbed(directory: Path, to: Path) -> Path:
    """The same model with other embeddings, so that routers read something else."""
    to.mkdir()
    tensors = load_file(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for key in tensors:
        if "embed" in key:
            noise = torch.randn(tensors[key].shape, generator=generator)
            tensors[key] = tensors[key] + 0.2 * tensors[key].std() * noise
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    (to / "config.json").write_bytes((directory / "config.json").read_bytes())
    return to


def chosen_by_transformers(directory: Path) -> list[list[set[int]]]:
    """The experts of each token of ``ROWS``, mixture by mixture, as its experts are called."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.set_experts_implementation("eager")
    found: list[list[set[int]]] = []

    def note(module: Any, args: tuple[Tensor, ...]) -> None:
        if len(args) > 1:
            found.append([set(token) for token in args[1].tolist()])
        else:  # llama4 gives every expert all tokens, of which it has put out those of others
            shares = args[0].view(module.gate_up_proj.shape[0], -1, args[0].shape[-1])
            found.append([set(t.nonzero().flatten().tolist()) for t in shares.abs().sum(-1).t()])

    for module in model.eval().modules():
        if holds_experts(module):
            module.register_forward_pre_hook(note)
    with torch.inference_mode():
        model(input_ids=ROWS, use_cache=False)
    return found


@pytest.mark.parametrize("model_type", list(MIXTURES))
def test_shares_are_those_of_transformers_own_choices(
    model_type: str, tiny: Tiny, tmp_path: Path
) -> None:
    directory = tiny(model_type)
    other = perturbed(directory, tmp_path / "other")
    pairs = zip(chosen_by_transformers(directory), chosen_by_transformers(other), strict=True)
    expected = [
        torch.tensor([mine != yours for mine, yours in zip(*pair, strict=True)]).view(ROWS.shape)
        for pair in pairs
    ]
    divergence = compare_predictions(streamed(directory), streamed(other))
    # The last token of a row predicts nothing that is judged.
    assert [part.tolist() for part in divergence.rerouted.values()] == [
        part[:, :-1].tolist() for part in expected
    ]
    quality = with_intervals(divergence.quality("float32"))
    found, sums = present(quality.experts_changed), present(quality.row_sums)
    shares = [part[:, :-1].double().mean().item() for part in expected]
    assert list(found.layers.values()) == pytest.approx(shares)
    assert found.mean == pytest.approx(sum(shares) / len(shares)) and 0 < found.mean < 1
    assert quality.metric("experts_changed.worst") == max(found.layers.values())
    interval = quality.intervals["experts_changed.mean"]
    low, high = mean_interval(present(sums.experts_changed), sums.tokens)
    assert interval.low <= found.mean <= interval.high
    assert (interval.low, interval.high) == pytest.approx((max(low, 0.0), min(high, 1.0)))
    assert sum(present(sums.experts_changed)) / sum(sums.tokens) == pytest.approx(found.mean)


def test_a_model_beside_itself_changes_none_and_a_dense_one_has_no_figure(tiny: Tiny) -> None:
    states = streamed(tiny("qwen3_moe"))
    same = compare_predictions(states, states).quality("float32")
    assert present(same.experts_changed).layers == {"0": 0.0, "1": 0.0, "2": 0.0}
    assert "experts_changed" in same.to_json() and "experts_changed" in same.to_json()["row_sums"]
    states = streamed(tiny("llama"))
    dense = with_intervals(compare_predictions(states, states).quality("float32"))
    assert dense.experts_changed is None and "experts_changed.mean" not in dense.intervals
    assert "experts_changed" not in str(dense.to_json())


def test_the_order_of_experts_and_empty_places_do_not_count() -> None:
    """As a router gives fewer experts to some tokens, in one batch of several."""
    rows = torch.zeros(2, 2, dtype=torch.long)
    first = torch.tensor([[3, 1], [2, -1], [4, 0]], dtype=torch.int16)
    last = torch.tensor([[5]], dtype=torch.int16)
    before = present(routing.choices([[first, last]], rows))
    assert before.tolist() == [[[3, 1], [2, -1]], [[4, 0], [5, -1]]]
    after = before.clone()
    after[0, 0] = torch.tensor([3, 2])
    after = torch.nn.functional.pad(after, (0, 1), value=-1)
    assert routing.changed({7: before}, {7: after})[7].tolist() == [[True, False], [False, False]]
    # Where a mixture saw other tokens than the rows', nothing can be said of a row.
    assert routing.choices([[first]], rows) is None
    assert routing.changed({7: before}, {}) == {}


def test_a_gate_on_experts_of_a_dense_model_is_refused() -> None:
    suite = load_suite("demo").suite
    gates = [*suite.gates, type(suite.gates[0])(metric="experts_changed.worst", max=0.1)]
    suite = suite.model_copy(update={"gates": gates})
    check_measured(suite, experts=True)
    with pytest.raises(InputError, match=r"experts_changed.worst, but the model has no experts"):
        check_measured(suite, experts=False)
