"""Folds: found in every kind of block, and applying them leaves the block's output the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.calibration import folds as folds_module
from quantkit.calibration.folds import find_folds
from quantkit.methods.awq.method import Awq
from quantkit.methods.grids import Grid
from quantkit.methods.linears import Linears
from quantkit.methods.rtn import Rtn
from quantkit.model.experts import Experts
from tests.helpers.measured_block import measured_block
from tests.helpers.tiny import Tiny

FOLDED = {
    # model type → number of a block's linears whose input can be rescaled, kinds of the folds
    "llama": (7, {"norm", "linear"}),
    "qwen3": (7, {"norm", "linear"}),
    "gemma2": (7, {"norm_plus_one", "linear"}),
    "gpt_neox": (2, {"norm"}),
    "opt": (6, {"norm", "linear"}),
    "olmo2": (2, {"linear"}),
}


@pytest.mark.parametrize("model_type", FOLDED)
def test_folds_of_every_kind_of_block_are_found(tiny: Tiny, model_type: str) -> None:
    measured = measured_block(tiny(model_type))
    count, kinds = FOLDED[model_type]
    assert sum(len(fold.consumers) for fold in measured.folds) == count
    assert {fold.kind for fold in measured.folds} == kinds
    read_together = {tuple(group.consumers) for group in measured.inputs}
    assert {fold.consumers for fold in measured.folds} <= read_together


@pytest.mark.parametrize("model_type", FOLDED)
def test_any_scale_leaves_the_output_the_same(tiny: Tiny, model_type: str) -> None:
    """Up to rounding in float32, since the scales aren't powers of two."""
    measured = measured_block(tiny(model_type))
    before = measured.output()
    for fold in measured.folds:
        weight = measured.block.get_parameter(f"{fold.producer}.weight")
        scale = torch.rand(weight.shape[0]) * 3 + 0.3
        weight.data = fold.divide(weight.data, scale)
        bias = dict(measured.block.named_parameters()).get(f"{fold.producer}.bias")
        if bias is not None:
            bias.data = bias.data / scale
        for name in fold.consumers:
            measured.block.get_parameter(f"{name}.weight").data *= fold.expand(scale)
    torch.testing.assert_close(measured.output(), before, rtol=1e-4, atol=1e-4)


def test_known_folds_are_proven_without_a_search(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = measured_block(tiny("llama"))
    monkeypatch.setattr(folds_module, "_candidates", lambda *_: pytest.fail("searched"))
    groups = [group.consumers for group in measured.inputs]
    call, hidden = measured.batch.calls[0], measured.batch.hidden
    assert find_folds(measured.block, groups, call, hidden, 2, measured.folds) == measured.folds


def test_narrow_inverts_expand(tiny: Tiny) -> None:
    (fold,) = [fold for fold in measured_block(tiny("llama")).folds if fold.repeat > 1]
    scale = torch.rand(32) + 0.5
    assert torch.equal(fold.narrow(fold.expand(scale)), scale)
    assert torch.allclose(fold.reduce(fold.expand(scale)), scale)


# model type → changes of its config, what reads the norm beside the experts, in all models
MIXTURES: dict[str, tuple[dict[str, object], set[str]]] = {
    "qwen3_moe": ({}, {"mlp.gate"}),
    "mixtral": ({}, {"mlp.gate"}),
    "gpt_oss": ({}, {"mlp.router"}),
    "glm4_moe": (
        {"first_k_dense_replace": 0},
        {"mlp.gate", "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"},
    ),
}


@pytest.mark.parametrize("model_type", MIXTURES)
def test_experts_share_a_fold_that_leaves_the_routing_as_it_is(tiny: Tiny, model_type: str) -> None:
    changes, beside = MIXTURES[model_type]
    measured = measured_block(tiny(model_type, torch.bfloat16, **changes))
    [fold] = [fold for fold in measured.folds if any(".experts." in n for n in fold.consumers)][:1]
    inside = {name for name in fold.consumers if ".experts." in name}
    assert set(fold.consumers) - inside == beside and fold.kind == "norm"
    assert {name.split(".")[-3] for name in inside} == {"experts"}
    assert len({name.split(".")[-2] for name in inside}) == 4
    assert len(measured.folds) == len({fold.consumers for fold in measured.folds})
    [mixture] = [part for part in measured.block.modules() if isinstance(part, Experts)]
    routed: list[tuple[torch.Tensor, ...]] = []
    mixture.register_forward_pre_hook(lambda _, given: routed.append(given[1:]))
    before = measured.output()
    # As engines compute it, in the model's own dtype, and by powers of two of any size.
    scale = torch.exp2(torch.randint(-7, 8, (64,)).float())
    norm = measured.block.get_parameter(f"{fold.producer}.weight")
    norm.data = fold.divide(norm.float(), scale).bfloat16()
    for name in fold.consumers:
        weight = measured.block.get_parameter(f"{name}.weight")
        weight.data = (weight.float() * scale).bfloat16()
    assert torch.equal(measured.output(), before)
    (index, weights), (same_index, same_weights) = routed
    assert torch.equal(index, same_index) and torch.equal(weights, same_weights)


@pytest.mark.parametrize("model_type", ["llama4_text", "qwen3_5_moe"])
def test_experts_whose_norm_cannot_be_divided_exactly_have_no_shared_fold(
    tiny: Tiny, model_type: str
) -> None:
    """llama4 multiplies what experts read by their weights; qwen3_5's norms multiply by 1 + w."""
    measured = measured_block(tiny(model_type))
    several = [fold for fold in measured.folds if any(".experts." in n for n in fold.consumers)]
    assert several and {fold.kind for fold in several} == {"linear"}


def test_awq_rescales_what_experts_read_and_keeps_the_routing(tiny: Tiny, tmp_path: Path) -> None:
    directory = tiny("qwen3_moe", torch.bfloat16)
    tensors = load_file(directory / "model.safetensors")
    for key, value in tensors.items():
        if "post_attention_layernorm" in key:  # as trained models have loud channels
            value[::16] *= 16
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(directory / "config.json", tmp_path)
    measured = measured_block(tmp_path)
    loud = measured.block.get_parameter("post_attention_layernorm.weight")
    schemes = {
        name: Grid(3, 32, symmetric=False)
        for group in measured.inputs
        for name in group.consumers
        if ".experts." in name
    }
    options: dict[str, Any] = {"bits": 3, "group_size": 32, "symmetric": False, "format": "gptq"}
    awq, rtn = Awq(method="awq", **options), Rtn(method="rtn", **options)
    linears = Linears.of(measured.block, schemes, measured.inputs, measured.folds)
    result = awq.quantize(linears)
    assert result.linears.keys() == schemes.keys()
    norm, router = (
        result.changed[f"{name}.weight"] for name in ("post_attention_layernorm", "mlp.gate")
    )
    scale = loud.float() / norm.float()
    assert torch.equal(scale.log2(), scale.log2().round()) and scale.unique().numel() > 1
    assert torch.equal(router.float(), measured.block.get_parameter("mlp.gate.weight") * scale)
    losses = []
    for made in (result, rtn.quantize(linears)):
        error = (measured.output(measured.replaced(made)) - measured.output()).float()
        losses.append(float(error.square().sum()))
    assert losses[0] < 0.95 * losses[1]
