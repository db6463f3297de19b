"""Configs that transformers can't build or run: the key is named, or what transformers said.

Oracle: transformers itself, which fails on each of them.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quantkit.base.errors import InputError
from quantkit.checkpoint.reader import Checkpoint
from quantkit.model import skeleton
from quantkit.model.build import empty_model
from quantkit.model.refusals import running
from quantkit.model.rehearsal import rehearse
from quantkit.model.skeleton import Skeleton
from quantkit.model.stream import Stream
from tests.helpers.tiny import Tiny


def changed(source: Path, target: Path, changes: dict[str, Any]) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def by_transformers(directory: Path) -> None:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings(action="ignore"):
        model = AutoModelForCausalLM.from_pretrained(directory)
        model(input_ids=torch.arange(8)[None])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pad_token_id": 96}, "pad_token_id is 96 there"),
        ({"pad_token_id": 4096}, "pad_token_id is 4096 there"),
        ({"vocab_size": 96.0}, "'vocab_size' expected int, got float (value: 96.0)"),
        ({"intermediate_size": "96"}, "'intermediate_size' expected int, got str"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0 there"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0 there"),
        ({"head_dim": 0}, "head_dim is 0 there"),
        ({"hidden_size": -64}, "hidden_size is -64 there"),
        ({"hidden_act": "swish9"}, "hidden_act is 'swish9' there"),
        (
            {"rope_parameters": {"rope_type": "ntk", "rope_theta": 1e4}},
            "rope_parameters.rope_type is 'ntk' there",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": "10000"}},
            "rope_parameters.rope_theta is '10000' there",
        ),
        ({"num_attention_heads": 3}, "not a multiple of the number of attention heads (3)"),
        ({"dtype": 16}, "dtype is 16, which isn't a dtype"),
    ],
)
def test_keys_that_transformers_fails_at_are_named(
    tiny: Tiny, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    directory = changed(tiny("llama"), tmp_path / "model", changes)
    with pytest.raises(Exception):  # noqa: B017 (of any class)
        by_transformers(directory)
    with pytest.raises(InputError) as caught:
        Skeleton(Checkpoint(directory))
    assert named in f"{caught.value} {caught.value.fix}"
    assert str(directory / "config.json") in str(caught.value)


def test_more_layers_than_tensors_are_refused_before_they_are_built(
    tiny: Tiny, tmp_path: Path
) -> None:
    directory = changed(tiny("llama"), tmp_path / "model", {"num_hidden_layers": 10**8})
    with pytest.raises(InputError, match="num_hidden_layers is 100000000, and there are only 30"):
        Skeleton(Checkpoint(directory))


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"return_dict": False}),
        ("qwen3", {"return_dict": False}),
        ("gemma2", {"return_dict": False}),
    ],
)
def test_models_that_transformers_cannot_run(
    tiny: Tiny, tmp_path: Path, model_type: str, changes: dict[str, Any]
) -> None:
    directory = changed(tiny(model_type), tmp_path / "model", changes)
    with pytest.raises(Exception) as theirs:
        by_transformers(directory)
    checkpoint = Checkpoint(directory)
    stream = Stream(Skeleton(checkpoint), checkpoint, torch.device("cpu"))
    with pytest.raises(InputError, match=r"config\.json: transformers can't run") as ours:
        stream.begin(torch.arange(8)[None], 1)
        with stream.head() as logits, stream.block(0):
            logits(stream.begin(torch.arange(8)[None], 1)[0], slice(0, 8))
    assert str(theirs.value) in str(ours.value)


def test_a_failure_of_our_own_is_raised_as_it_is() -> None:
    from transformers.activations import ACT2FN

    model, here = torch.nn.Linear(1, 1), Path("model")
    with pytest.raises(ZeroDivisionError), running(model, here):
        _ = 1 // 0
    refused = pytest.raises(InputError, match=r"model/config\.json: transformers can't run Linear")
    with refused, running(model, here):
        ACT2FN["swish9"]
    with pytest.raises(RuntimeError), running(model, here):
        torch.empty(1 << 60)


def test_more_than_hidden_states_between_layers(tiny: Tiny) -> None:
    """As in zaya, whose routers read what those of the layer before made."""
    heads: dict[str, Any] = {"head_dim": 16, "num_key_value_heads": 2, "router_hidden_size": 16}
    experts: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 1}
    checkpoint = Checkpoint(tiny("zaya", **heads, **experts, moe_intermediate_size=32))
    with pytest.raises(InputError, match="needs more of the one before than its hidden states"):
        rehearse(Skeleton(checkpoint))


def test_no_text_without_an_image(tiny: Tiny) -> None:
    model = Skeleton(Checkpoint(tiny("llama"))).model

    def forward(*_: Any, **__: Any) -> None:
        raise ValueError("You have to specify either `pixel_values` or `image_embeds`.")

    forward.__code__ = forward.__code__.replace(co_filename=transformers.__file__)
    with (
        pytest.raises(InputError, match="LlamaForCausalLM reads no text without an image"),
        running(model, Path()),
    ):
        forward()


def test_a_model_that_names_no_number_of_layers(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As BltConfig, which counts the layers of each of its parts."""
    checkpoint = Checkpoint(tiny("llama"))
    model = empty_model(checkpoint, None)

    class Text:
        pass

    monkeypatch.setattr(type(model.config), "get_text_config", lambda *_, **__: Text())
    monkeypatch.setattr(skeleton, "empty_model", lambda *_: model)
    with pytest.raises(InputError, match="says nowhere how many decoder layers"):
        Skeleton(checkpoint)


def test_types_that_have_the_class_of_another(tiny: Tiny, tmp_path: Path) -> None:
    """InternLM3 is a Llama to transformers, with a config of its own."""
    directory = changed(tiny("llama"), tmp_path / "m", {"model_type": "internlm3"})
    assert type(Skeleton(Checkpoint(directory)).model).__name__ == "LlamaForCausalLM"


def test_linears_of_a_kind_of_their_own(tiny: Tiny) -> None:
    """Falcon's is written out; a router of gpt_oss returns more than a product."""
    falcon = Skeleton(Checkpoint(tiny("falcon", new_decoder_architecture=False)))
    assert "self_attention.dense" in falcon.linears(0)
    routers = Skeleton(Checkpoint(tiny("llama4_text", num_local_experts=4, head_dim=16)))
    assert not [name for name in routers.linears(0) if name.endswith("router")]
