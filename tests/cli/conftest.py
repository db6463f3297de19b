"""Files of every kind, made once a session."""

from __future__ import annotations

import pytest

from tests.helpers.fuzzing import Sources


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources(tmp_path_factory.mktemp("sources"))
