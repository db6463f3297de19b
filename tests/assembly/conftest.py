"""Artifacts of the demo model that no run was stopped for, made once."""

from __future__ import annotations

import pytest

from tests.helpers.demo_runs import Whole


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(tmp_path_factory.mktemp("whole"))
