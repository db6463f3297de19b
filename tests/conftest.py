"""Tiny seeded random models, made once a session and saved as checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.demo_artifacts import SHIPPED, TWO_BITS, make
from tests.helpers.tiny import Tiny, build

# Before anything imports Triton: kernels are interpreted where there is no GPU (helpers.kernels).
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


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


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo by every shipped recipe, and by 2-bit round-to-nearest."""
    folder = tmp_path_factory.mktemp("artifacts")
    for recipe in SHIPPED:
        make(recipe, folder / recipe)
    make("rtn-w4-g128", folder / "rtn-w2", TWO_BITS)
    return {path.name: path for path in folder.iterdir()}
