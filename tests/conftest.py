"""Tiny seeded random models, made once a session and saved as checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.tiny import Tiny, build


@pytest.fixture(autouse=True, scope="session")
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests leave the user's cache alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A function from a model type (and config changes) to a checkpoint directory."""
    made: dict[str, Path] = {}

    def make(model_type: str, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
        key = f"{model_type}-{dtype}-{sorted(changes.items())}"
        if key not in made:
            made[key] = build(
                model_type, tmp_path_factory.mktemp(model_type), dtype=dtype, **changes
            )
        return made[key]

    return make
