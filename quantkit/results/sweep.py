"""The artifacts of a sweep, and what a suite decided about them."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.results.comparison import Comparison, Variant


@dataclass(frozen=True)
class Sweep:
    """What a sweep made, in the order of its recipes.

    variants: a row for each artifact; comparison: with the baseline, None without a suite.
    """

    variants: tuple[Variant, ...]
    comparison: Comparison | None = None
