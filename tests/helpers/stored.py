"""Packed tensors in memory as a checkpoint would hand them to a format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from quantkit.formats.format import StoredLinear


def stored(
    parts: Mapping[str, Tensor], settings: Mapping[str, Any], module: str = "m"
) -> StoredLinear:
    """The linear ``module`` whose tensors, by suffix, are ``parts``."""
    return StoredLinear(
        module,
        settings,
        tuple(parts),
        shape=lambda suffix: tuple(parts[suffix].shape),
        read=lambda suffix: parts[suffix],
    )
