"""Plans of linears: every scheme is one that the format stores, overrides' schemes too."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from quantkit.base.errors import InputError
from quantkit.checkpoint.reader import Checkpoint
from quantkit.methods.grids import Grid
from quantkit.methods.method import Override
from quantkit.methods.rtn import Rtn
from quantkit.model.skeleton import Skeleton
from quantkit.plan.candidates import widest_globs
from quantkit.plan.linears import LinearPlan, plan_linears
from tests.helpers.tiny import Tiny


def plan(
    tiny: Tiny,
    *overrides: Override,
    symmetric: bool = True,
    format: str = "gptq",
    ignore: Sequence[str] = ("lm_head",),
) -> LinearPlan:
    checkpoint = Checkpoint(tiny("llama"))
    method = Rtn(
        method="rtn",
        bits=4,
        group_size=32,
        symmetric=symmetric,
        format=format,
        overrides=list(overrides),
        ignore=list(ignore),
    )
    return plan_linears(method, Skeleton(checkpoint), checkpoint)


@pytest.mark.parametrize(("format", "lowest"), [("gptq", 1), ("awq", 0), ("gguf", 0)])
def test_zero_points_are_those_that_the_format_stores(tiny: Tiny, format: str, lowest: int) -> None:
    """GPTQ stores zero points minus one; GGUF stores scale times zero point in fp16."""
    (scheme,) = set(plan(tiny, symmetric=False, format=format).schemes.values())
    assert scheme == Grid(4, 32, False, lowest, exact_minimum=format == "gguf")


@pytest.mark.parametrize("symmetric", [True, False])
def test_an_override_of_symmetry_is_for_its_modules_alone(tiny: Tiny, symmetric: bool) -> None:
    other = Override(match="*.mlp.down_proj", symmetric=not symmetric)
    planned = plan(tiny, other, symmetric=symmetric, format="compressed-tensors")
    for name, scheme in planned.schemes.items():
        assert scheme == Grid(4, 32, symmetric != name.endswith("mlp.down_proj"))


def test_what_is_outside_the_layers_is_kept(tiny: Tiny) -> None:
    planned = plan(tiny)
    assert set(planned.outside) == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }
    assert len(planned.schemes) == 3 * 7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (Override(match="*.k_proj", bits=8), "k_proj, q_proj, v_proj are loaded as one matrix"),
        (Override(match="*.no_such", skip=True), r"pattern '\*\.no_such' matches no linear"),
        (Override(match="*_proj", group_size=48), "group size 48 doesn't divide 64"),
        (Override(match="*_proj", bits=5), "holds 2, 3, 4, 8 bits, not 5"),
    ],
)
def test_what_cannot_be_is_refused(tiny: Tiny, override: Override, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(tiny, override)


def test_a_tower_outside_the_layers_stays_and_is_named_by_one_glob(tiny: Tiny) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    text = {**sizes, "vocab_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    vision = {**sizes, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    directory = tiny("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    checkpoint = Checkpoint(directory)
    settings = {"bits": 4, "group_size": 32, "symmetric": True, "format": "gptq"}
    method = Rtn.model_validate({"method": "rtn", **settings})
    planned = plan_linears(method, Skeleton(checkpoint), checkpoint)
    assert len(planned.schemes) == 2 * 7
    assert {tensor.name for tensor in planned.tensors} == set(checkpoint.keys())
    (note,) = planned.notes
    assert note == "left as it is: model.vision_tower.* (15 linears): outside the decoder layers"
    assert set(planned.kept.values()) == {"outside the decoder layers"}


@pytest.mark.parametrize(
    ("outside", "inside", "globs"),
    [
        (["lm_head"], ["model.layers.0.q_proj"], ["lm_head"]),
        (
            ["visual.blocks.0.qkv", "visual.blocks.1.qkv", "visual.merger.mlp.0", "lm_head"],
            ["model.layers.0.q_proj"],
            ["visual.*", "lm_head"],
        ),
        (
            ["model.tower.0.fc1", "model.multi_modal_projector.linear_1", "model.embed"],
            ["model.language_model.layers.0.q_proj"],
            ["model.tower.*", "model.multi_modal_projector.*", "model.embed"],
        ),
        (["model.layers.0.extra"], ["model.layers.0.q_proj"], ["model.layers.0.extra"]),
    ],
)
def test_globs_are_wide_and_match_nothing_else(
    outside: list[str], inside: list[str], globs: list[str]
) -> None:
    assert widest_globs(outside, [*outside, *inside]) == globs


def test_linears_that_fail_alike_are_named_together(tiny: Tiny) -> None:
    with pytest.raises(InputError, match=r"^model\.layers\.0\.mlp\.down_proj") as caught:
        plan(tiny, Override(match="*.mlp.down_proj", bits=5))
    assert str(caught.value.fix).endswith("The same holds for model.layers.*.mlp.down_proj.")


@pytest.mark.parametrize(
    ("pattern", "fix"),
    [
        ("model.layers.0", r"Write model\.layers\.0\.\* for the linears in it"),
        ("model.layers.*.mlp", "for the linears in it"),
        ("model", "for the linears in it"),
        ("model.layers.0.mlp.up_proj.weight", "globs on full names"),
        ("*.up_proj.weight", "globs on full names"),
        ("", "globs on full names"),
    ],
)
def test_ignoring_what_holds_linears_but_is_none_is_refused(
    tiny: Tiny, pattern: str, fix: str
) -> None:
    """Accepted, it would leave nothing out, and nobody would be told."""
    with pytest.raises(InputError, match="matches no linear module") as caught:
        plan(tiny, ignore=["lm_head", pattern])
    assert re.search(fix, str(caught.value.fix))


@pytest.mark.parametrize(
    "pattern", ["model.norm", "*layernorm*", "model.embed_tokens.weight", "model.layers.0.*"]
)
def test_ignoring_what_is_never_quantized_is_no_mistake(tiny: Tiny, pattern: str) -> None:
    schemes = plan(tiny, ignore=["lm_head", pattern]).schemes
    assert len(schemes) == (14 if pattern == "model.layers.0.*" else 21)
