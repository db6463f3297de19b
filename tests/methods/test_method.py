"""Settings of methods: which scheme a linear gets, and settings that are refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from quantkit.methods.grids import Grid
from quantkit.methods.rtn import Rtn

UP, DOWN = "model.layers.3.mlp.up_proj", "model.layers.3.mlp.down_proj"


def rtn(**settings: Any) -> Rtn:
    plain = {"method": "rtn", "format": "gptq", "bits": 4, "group_size": 128, "symmetric": True}
    return Rtn.model_validate({**plain, **settings})


def scheme(method: Rtn, name: str) -> object:
    return method.scheme_of(name, method.default_scheme())


def test_a_linear_has_the_default_scheme_unless_it_is_ignored() -> None:
    assert scheme(rtn(), UP) == Grid(4, 128, True)
    assert scheme(rtn(), "lm_head") is None
    everything = rtn(ignore=[])
    assert scheme(everything, "lm_head") == Grid(4, 128, True)


def test_the_last_override_that_matches_wins_key_by_key() -> None:
    method = rtn(
        overrides=[
            {"match": "*.mlp.*", "bits": 8, "group_size": 32},
            {"match": "*.down_proj", "bits": 3},
        ]
    )
    assert scheme(method, UP) == Grid(8, 32, True)
    assert scheme(method, DOWN) == Grid(3, 32, True)
    assert method.patterns() == [
        ("quantize.ignore", "lm_head"),
        ("quantize.overrides", "*.mlp.*"),
        ("quantize.overrides", "*.down_proj"),
    ]


def test_an_override_after_one_that_skips_starts_from_the_default() -> None:
    skip = {"match": "*.mlp.*", "skip": True}
    assert scheme(rtn(overrides=[skip]), DOWN) is None
    again = {"match": "*.down_proj", "bits": 8}
    assert scheme(rtn(overrides=[skip, again]), DOWN) == Grid(8, 128, True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 4}, "group_size 4 must be -1"),
        ({"overrides": [{"match": "*", "group_size": 0}]}, "group_size 0 must be -1"),
        ({"overrides": [{"match": "*"}]}, "an override needs skip: true, or"),
        ({"overrides": [{"match": "*", "skip": True, "bits": 8}]}, "an override needs skip"),
        ({"bits": 9}, "less than or equal to 8"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        rtn(**settings)
