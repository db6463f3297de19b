"""The scripts of demo/ are no package: its folder is put on the path, as when one of them runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "demo"))


@pytest.fixture(scope="session")
def world_text() -> list[str]:
    """All documents that the demo model was trained on; writing them takes seconds."""
    import world

    return list(world.training_documents())
