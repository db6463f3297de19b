"""Mixtures of experts and multimodal models: streamed, they are what transformers computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quantkit.base.errors import InputError
from quantkit.checkpoint.reader import Checkpoint
from quantkit.model.expert_layout import holds_experts
from quantkit.model.experts import Experts, prove
from quantkit.model.rehearsal import rehearse
from quantkit.model.skeleton import Skeleton
from quantkit.model.stream import Stream, slices
from tests.helpers.tiny import MIXTURES, SHARING, WRAPPERS, Tiny


def whole(directory: Path) -> Any:
    """The model of transformers, whose experts are plain products, one after the other."""
    name = json.loads((directory / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(directory, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")
    return model


def streamed(directory: Path, rows: torch.Tensor) -> torch.Tensor:
    checkpoint = Checkpoint(directory)
    stream = Stream(Skeleton(checkpoint, torch.float32), checkpoint, torch.device("cpu"))
    batches = stream.begin(rows, 2)
    for index in range(len(stream.skeleton.layers)):
        with stream.block(index) as block:
            stream.advance(index, block, batches)
    with stream.head() as logits:
        parts = list(slices(stream.vocabulary))
        return torch.cat([torch.cat([logits(b, part) for part in parts], -1) for b in batches])


@pytest.mark.parametrize("model_type", [*MIXTURES, *WRAPPERS, *SHARING])
def test_streamed_logits_are_those_of_transformers(model_type: str, tiny: Tiny) -> None:
    directory = tiny(model_type)
    rows = torch.randint(3, 90, (4, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model = whole(directory)
        expected = torch.cat([model(input_ids=r, use_cache=False).logits for r in rows.split(2)])
    # A product with gate and up side by side may round its sums elsewhere than two products do.
    torch.testing.assert_close(streamed(directory, rows), expected, rtol=1e-5, atol=1e-6)


def test_experts_in_layers_that_share_keys_and_values(tiny: Tiny) -> None:
    experts: dict[str, Any] = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}
    directory = tiny("gemma4_text", **experts, moe_intermediate_size=32)
    rows = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = whole(directory)(input_ids=rows, use_cache=False).logits
    assert torch.equal(streamed(directory, rows), expected)


@pytest.mark.parametrize("model_type", ["mixtral", "granitemoe"])
def test_a_mixture_may_have_one_expert(model_type: str, tiny: Tiny) -> None:
    directory = tiny(model_type, num_local_experts=1, num_experts_per_tok=1)
    rows = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = whole(directory)(input_ids=rows, use_cache=False).logits
    torch.testing.assert_close(streamed(directory, rows), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", list(MIXTURES))
def test_every_expert_has_linears_of_its_own(model_type: str, tiny: Tiny) -> None:
    checkpoint = Checkpoint(tiny(model_type))
    skeleton = Skeleton(checkpoint)
    source = skeleton.viewed(checkpoint)
    assert skeleton.has_experts and not any(map(holds_experts, skeleton.model.modules()))
    for name, parameter in skeleton.model.named_parameters():
        assert source.read(skeleton.key(name)).shape == parameter.shape
    linears = {name for index in range(3) for name in skeleton.linears(index)}
    assert sum(name.endswith("3.down_proj") or name.endswith("3.w2") for name in linears) == 1
    assert rehearse(skeleton) >= {
        f"{skeleton.layer_name(2)}.{name}" for name in skeleton.linears(2) if ".experts." in name
    }


def test_a_module_that_computes_something_else_is_refused(tiny: Tiny) -> None:
    """As if a new family of models multiplied by something of its own inside the experts."""
    skeleton = Skeleton(Checkpoint(tiny("mixtral")))
    [experts, *_] = (m for m in skeleton.model.modules() if isinstance(m, Experts))
    original: Any = experts.original

    class Other(type(original)):  # type: ignore[misc]
        def forward(self, hidden: Any, index: Any = None, weights: Any = None) -> Any:
            return 1.001 * super().forward(hidden, index, weights)

    shapes = {"gate_up_proj": (192, 64), "down_proj": (64, 96)}
    prove(original, experts.pieces, shapes, False, "here")
    original.__class__ = Other
    with pytest.raises(InputError, match="something else than gate, up and down"):
        prove(original, experts.pieces, shapes, False, "here")


def test_all_tokens_can_be_seen_without_changing_what_comes_out(tiny: Tiny) -> None:
    checkpoint = Checkpoint(tiny("qwen3_moe"))
    stream = Stream(Skeleton(checkpoint), checkpoint, torch.device("cpu"))
    with stream.block(0) as block, torch.inference_mode():
        mixture: Any = block.get_submodule("mlp.experts")
        hidden = torch.randn(10, 64)
        index, weights = torch.zeros(10, 1, dtype=torch.long), torch.ones(10, 1)
        seen: list[int] = []
        hook = mixture.get_submodule("2.gate_proj").register_forward_pre_hook(
            lambda _, args: seen.append(len(args[0]))
        )
        expected = mixture(hidden, index, weights)
        with mixture.watched({0, 2}):
            assert torch.equal(mixture(hidden, index, weights), expected)
        assert seen == [10]
        with mixture.all_tokens():
            assert not torch.equal(mixture(hidden, index, weights), expected)
        hook.remove()
        assert torch.equal(mixture(hidden, index, weights), expected)


def test_layers_that_a_model_runs_more_than_once_are_refused(tiny: Tiny) -> None:
    """A loop over the layers that only the model's own code knows gives other hidden states."""
    skeleton = Skeleton(Checkpoint(tiny("llama")))
    assert rehearse(skeleton)
    decoder: Any = skeleton.model.get_decoder()
    original = decoder.forward

    def twice(input_ids: Any = None, inputs_embeds: Any = None, **kwargs: Any) -> Any:
        first = original(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)
        return original(inputs_embeds=first.last_hidden_state, **kwargs)

    decoder.forward = twice
    with pytest.raises(InputError, match="run one by one"):
        rehearse(skeleton)


def test_layers_that_are_spread_over_lists_are_refused(tiny: Tiny) -> None:
    with pytest.raises(InputError, match=r"transformer\.attentions, transformer\.ffns"):
        Skeleton(Checkpoint(tiny("xlm", emb_dim=64, n_layers=3, n_heads=4)))


@pytest.mark.parametrize("named", [None, "Qwen3_5ForCausalLM", "LlamaForCausalLM", "Unknown"])
def test_a_whole_model_is_built_whatever_class_is_named(
    named: str | None, tiny: Tiny, tmp_path: Path
) -> None:
    """The class for text alone would leave the tower out."""
    for path in tiny("qwen3_5").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = None if named is None else [named]
    (tmp_path / "config.json").write_text(json.dumps(config))
    skeleton = Skeleton(Checkpoint(tmp_path))
    assert type(skeleton.model).__name__ == "Qwen3_5ForConditionalGeneration"
    assert skeleton.towers == ("model.visual",)


def test_code_of_a_checkpoint_is_not_run(tiny: Tiny, tmp_path: Path) -> None:
    directory = tiny("llama")
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    code = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    config |= {"model_type": "mine", "auto_map": code}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(InputError, match="runs no code from checkpoints"):
        Skeleton(Checkpoint(tmp_path))


def test_what_layers_share_belongs_to_one_batch(tiny: Tiny) -> None:
    """Equal batches keep one copy of their arguments, but not of what layers put things into."""
    for model_type, shared in (("gemma4_text", False), ("qwen3_moe", True)):
        checkpoint = Checkpoint(tiny(model_type))
        stream = Stream(Skeleton(checkpoint), checkpoint, torch.device("cpu"))
        first, second = stream.begin(torch.arange(12).repeat(2, 1), 1)
        assert (first.calls is second.calls) == shared
