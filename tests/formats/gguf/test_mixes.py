"""The mixes against llama-quantize's choices, overrides and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from quantkit.base.errors import InputError
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.gguf.file import plan_file
from quantkit.formats.gguf.mixes import MIXES, ModelTraits
from quantkit.formats.gguf.tensor_types import choose_types
from quantkit.methods.ggml.method import MixName
from tests.helpers.gguf_tiny import checkpoint

pytest.importorskip("gguf")

RECORDED = json.loads((Path(__file__).parents[2] / "data/llama_quantize_types.json").read_text())
Shapes = dict[str, tuple[int, ...]]


def shapes_of(model: dict[str, Any]) -> Shapes:
    hidden, inner = model["hidden"], model["inner"]
    kv = hidden // model["heads"] * model["kv_heads"]
    block: Shapes = {"attn_norm.weight": (hidden,), "ffn_norm.weight": (hidden,)}
    if model["fused"]:
        block["attn_qkv.weight"] = (hidden + 2 * kv, hidden)
    else:
        block["attn_q.weight"] = (hidden, hidden)
        block["attn_k.weight"] = block["attn_v.weight"] = (kv, hidden)
    block["attn_output.weight"] = (hidden, hidden)
    if model["gate"]:
        block["ffn_gate.weight"] = (inner, hidden)
    block |= {"ffn_up.weight": (inner, hidden), "ffn_down.weight": (hidden, inner)}
    block["ffn_down.bias"] = (hidden,)
    shapes: Shapes = {
        "token_embd.weight": (model["vocab"], hidden),
        "output_norm.weight": (hidden,),
    }
    for layer in range(model["layers"]):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    return shapes if model["tied"] else {**shapes, "output.weight": (model["vocab"], hidden)}


def recorded_type(facts: dict[str, str], name: str, layers: int) -> str:
    """llama.cpp's types of one tensor, by layer; TYPE*n is n layers in a row."""
    if name.endswith(".bias") or "_norm" in name:
        return "F32"
    part, *rest = name.removeprefix("blk.").split(".")
    if not name.startswith("blk."):
        return facts.get(part, facts["every"])
    runs = facts.get(rest[0], facts["every"]).split()
    if len(runs) == 1:
        return runs[0]
    types = [type for run in runs for type in [run.split("*")[0]] * int((run + "*1").split("*")[1])]
    assert len(types) == layers
    return types[int(part)]


@pytest.mark.parametrize("model", RECORDED["models"], ids=lambda model: model["name"])
def test_types_equal_llama_quantize(model: dict[str, Any]) -> None:
    shapes = shapes_of(model)
    assert set(model["mixes"]) == set(MIXES)
    for name, recorded in model["mixes"].items():
        for imatrix in (False, True):
            traits = ModelTraits(
                model["architecture"],
                model["layers"],
                model["heads"],
                model["kv_heads"],
                model["tied"],
                imatrix,
            )
            facts = recorded["types"]
            if imatrix:
                facts = recorded.get("with_imatrix", facts)
            elif recorded.get("needs_imatrix"):
                with pytest.raises(InputError, match="needs importance weights"):
                    choose_types(shapes, MIXES[name], traits)
                continue
            choices = choose_types(shapes, MIXES[name], traits)
            differing = {
                tensor: (choice.type, fact)
                for tensor, choice in choices.items()
                if choice.type != (fact := recorded_type(facts, tensor, model["layers"]))
            }
            assert not differing, f"{name}, imatrix {imatrix}"


def test_recipes_may_name_every_mix() -> None:
    assert get_args(MixName) == tuple(MIXES)


def test_overrides() -> None:
    shapes = {"blk.0.ffn_down.weight": (8, 256), "blk.1.ffn_down.weight": (8, 192)}
    traits = ModelTraits("llama", layers=2, heads=1, kv_heads=1, tied=True)

    def types(match: str, type: str) -> list[str]:
        override = SimpleNamespace(match=match, type=type)
        chosen = choose_types(shapes, MIXES["q4_k_m"], traits, [override])
        return [choice.type for choice in chosen.values()]

    assert types("blk.0.*", "Q3_K") == ["Q3_K", "Q8_0"]
    assert types("*.ffn_down.weight", "F16") == ["F16", "F16"]
    with pytest.raises(InputError, match="matches no tensor"):
        types("blk.7.*", "Q6_K")
    with pytest.raises(InputError, match="don't divide"):
        types("*", "Q6_K")
    with pytest.raises(InputError, match="unknown ggml type"):
        types("*", "Q7_K")
    with pytest.raises(InputError, match=r"blk\.0\.ffn_down\.weight would be IQ2_XS, which needs"):
        types("blk.0.*", "IQ2_XS")


def test_no_importance_is_measured_outside_the_blocks() -> None:
    shapes = {"token_embd.weight": (8, 256)}
    traits = ModelTraits("llama", layers=1, heads=1, kv_heads=1, tied=True, imatrix=True)
    override = SimpleNamespace(match="token_embd.weight", type="IQ2_XXS")
    with pytest.raises(InputError, match=r"token_embd\.weight has no importance weights"):
        choose_types(shapes, MIXES["q8_0"], traits, [override])


def test_fallbacks_are_named_or_refused(tmp_path: Path) -> None:
    source = Checkpoint(checkpoint(tmp_path, intermediate_size=320, num_hidden_layers=1))
    plan = plan_file(source, "q4_k_m")
    assert [(t.name, t.wanted, t.type) for t in plan.fallbacks] == [
        ("blk.0.ffn_down.weight", "Q6_K", "Q8_0")
    ]
    with pytest.raises(InputError, match=r"1 tensors .* blk\.0\.ffn_down\.weight \(rows of 320"):
        plan_file(source, "q4_k_m", no_fallback=True)
    override = SimpleNamespace(match="*.ffn_down.weight", type="Q5_0")
    assert not plan_file(source, "q4_k_m", [override], no_fallback=True).fallbacks
