"""Where an artifact loses quality and what would fix it, as frozen dataclasses for the results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PlaceLoss:
    """What one place of an artifact costs.

    modules: full names of what a recipe treats as one; error: predicted, how much of what their
    layer makes changes when they are put back (squared, relative; of the weights themselves
    outside the layers); kl_divergence: the artifact's mean with this place alone in the
    baseline's weights, None where it wasn't measured.
    """

    modules: tuple[str, ...]
    error: float
    kl_divergence: float | None


@dataclass(frozen=True)
class Patch:
    """A derived recipe that gives more bits to the places that cost most.

    recipe: all of it; changes: what it adds, in the recipe's own language; nbytes: planned size
    of its artifact, added_bytes more than now; predicted: metrics with those places in the
    baseline's weights; fixes: every gate on likelihood would hold then, None where none failed.
    """

    recipe: dict[str, Any]
    changes: tuple[dict[str, Any], ...]
    nbytes: int
    added_bytes: int
    predicted: dict[str, float]
    fixes: bool | None


@dataclass(frozen=True)
class Localisation:
    """Where an artifact loses quality, on the first ``rows`` rows of the suite's text.

    kl_divergence: its mean there; places: the greatest predicted error first; patch: None where
    there is nothing to fix or, for the reason that ``no_patch`` gives, no way to.
    """

    rows: int
    kl_divergence: float
    places: tuple[PlaceLoss, ...]
    patch: Patch | None = None
    no_patch: str | None = None
