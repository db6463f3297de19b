"""Rows of a comparison as results have them, made up."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from quantkit.judging.variants import apply_gates
from quantkit.recipes.suite import Gate
from quantkit.results.comparison import Comparison, Variant
from quantkit.results.cost import Cost
from quantkit.results.quality import KlDivergence, Perplexity, Quality, RowSums
from quantkit.results.regression import CaseOutcome, RegressionResult
from quantkit.results.verdict import Verdict


def quality(kl: float = 0.01, broken: int = 0) -> Quality:
    cases = tuple(
        CaseOutcome(f"c{i}", i >= broken, True, i == 0, (), "no|w", "before") for i in range(4)
    )
    return Quality(
        perplexity=Perplexity(10.0, 0.1, 1.01),
        kl_divergence=KlDivergence(mean=kl, p99=kl * 5),
        top1_agreement=0.97,
        regression=RegressionResult(cases),
        dtype="float32",
        rows=8,
        sequence_length=256,
    )


def variant(**changes: Any) -> Variant:
    fields: dict[str, Any] = {
        "name": "v",
        "path": "v",
        "recipe": "v 1.0.0",
        "method": "awq",
        "format": "awq",
        "bits_per_weight": 4.2,
        "disk_bytes": 10_000_000,
        "quality": quality(),
    }
    return Variant(**{**fields, **changes})


def over_rows(kl: list[float]) -> Quality:
    """A quality of rows of 100 tokens with these KL divergences a token."""
    count = len(kl)
    zeros = (0.0,) * count
    sums = RowSums((100,) * count, zeros, zeros, tuple(100 * x for x in kl), (100,) * count)
    mean = sum(kl) / count
    return replace(
        quality(), kl_divergence=KlDivergence(mean=mean, p99=1), rows=count, row_sums=sums
    )


SPREAD = [0.01 * (1 + 0.5 * math.sin(i)) for i in range(64)]  # mean 0.0100, ± 9%


def comparison() -> Comparison:
    cost = Cost("transformers", "cpu", 2, 128, 32, 3, missing={"decode": "no such kernel"})
    row = apply_gates(
        variant(quality=quality(broken=1), cost=cost), [Gate(metric="regression.broken", max=0)]
    )
    base = variant(name="BF16", recipe=None, method=None)
    return Comparison(
        "s 1.0.0", base, (), (row,), ("v: the weights only.",), "serve it", Verdict.FAIL
    )
