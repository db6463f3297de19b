"""Where an artifact loses quality, and the recipe that would fix it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PlaceLoss:
    """What one place of an artifact costs.

    modules: full names of the linears or embeddings that a recipe can only treat together; error:
    the relative squared change of their layer's output when they alone get the baseline's weights
    back (outside the layers, of the weights themselves); kl_divergence: the mean KL divergence of
    the artifact with this place alone restored, None where it wasn't measured.
    """

    modules: tuple[str, ...]
    error: float
    kl_divergence: float | None


@dataclass(frozen=True)
class Patch:
    """A derived recipe that gives more bits to the places that cost most.

    recipe: its whole content; changes: the entries that it adds to ``overrides`` or ``ignore``;
    nbytes: planned size of its artifact; added_bytes: how much larger that is than the recipe's
    without the changes; predicted: metrics with those places in the baseline's weights; fixes:
    whether every likelihood gate is predicted to pass, None where none of them failed.
    """

    recipe: dict[str, Any]
    changes: tuple[dict[str, Any], ...]
    nbytes: int
    added_bytes: int
    predicted: dict[str, float]
    fixes: bool | None


@dataclass(frozen=True)
class Localization:
    """Where an artifact loses quality, measured on the first ``rows`` rows of the suite's text.

    kl_divergence: the artifact's mean on these rows; places: in order of falling ``error``; patch:
    None where nothing failed, or where nothing can be fixed for the reason in ``no_patch``.
    """

    rows: int
    kl_divergence: float
    places: tuple[PlaceLoss, ...]
    patch: Patch | None = None
    no_patch: str | None = None
