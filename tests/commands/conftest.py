"""Artifacts of the demo model, and how the demo suite judges them. Tests only read them."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.base.progress import Silent
from quantkit.base.resources import demo_model
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.gguf.file import plan_file
from quantkit.formats.gguf.writer import write_file
from quantkit.judging.quality import judge_quality
from quantkit.recipes.suite import load_suite
from quantkit.results.quality import Qualities, Quality
from tests.helpers.demo_artifacts import make


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo by round-to-nearest."""
    out = tmp_path_factory.mktemp("made") / "rtn"
    make("rtn-w4-g128", out)
    return out


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo as plain Q8_0, a file alone."""
    path = tmp_path_factory.mktemp("made") / "demo-q8_0.gguf"
    baseline = Checkpoint(demo_model())
    write_file(path, plan_file(baseline, "q8_0"), baseline)
    return path


@pytest.fixture(scope="session")
def qualities(artifacts: dict[str, Path]) -> tuple[dict[str, Path], Qualities]:
    """The demo suite's word on some artifacts, and on the baseline given as an artifact."""
    names = ["rtn-w4-g128", "gguf-q8-0", "rtn-w2", "ct-w4a16-g128", "ct-awq-w4a16-g128"]
    names += ["int8-w8a8", "fp8"]
    paths = {name: artifacts[name] for name in names} | {"bf16": demo_model()}
    baseline, suite = Checkpoint(demo_model()), load_suite("demo")
    found = judge_quality(list(paths.values()), baseline, suite, device="cpu", progress=Silent())
    return paths, found


@pytest.fixture(scope="session")
def judged(
    qualities: tuple[dict[str, Path], Qualities],
) -> tuple[Quality, dict[str, Quality]]:
    """Qualities of the baseline and of some artifacts under the demo suite."""
    paths, found = qualities
    return found.baseline, dict(zip(paths, found.artifacts, strict=True))
