"""Plans of linears: every scheme is one that the format stores, overrides' schemes too."""

from __future__ import annotations

import pytest

from quantkit.base.errors import InputError
from quantkit.checkpoint.reader import Checkpoint
from quantkit.methods.grids import Grid
from quantkit.methods.method import Override
from quantkit.methods.rtn import Rtn
from quantkit.model.skeleton import Skeleton
from quantkit.plan.linears import LinearPlan, plan_linears
from tests.helpers.tiny import Tiny


def plan(
    tiny: Tiny, *overrides: Override, symmetric: bool = True, format: str = "gptq"
) -> LinearPlan:
    checkpoint = Checkpoint(tiny("llama"))
    method = Rtn(
        method="rtn",
        bits=4,
        group_size=32,
        symmetric=symmetric,
        format=format,
        overrides=list(overrides),
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
