"""What is said of the rows of a comparison."""

from __future__ import annotations

import pytest

from quantkit.judging.variants import differences
from tests.helpers.variants import variant


@pytest.mark.parametrize(("method", "what"), [("awq", "the weights"), ("fp8", "inputs of linears")])
def test_what_differs_names_the_inputs_where_they_are_rounded(method: str, what: str) -> None:
    (said,) = differences(variant(name="BF16"), [], [variant(method=method)])
    assert f"{what} only" in said
