"""Suites: versioned YAML files that say how an artifact is judged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, model_validator

from quantkit import resources
from quantkit.documents import Strict, Versioned, find, read_yaml, validate


class Likelihood(Strict):
    """Held-out text for perplexity and KL divergence."""

    dataset: str
    sequence_length: Annotated[int, Field(ge=8)] = 512
    rows: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description="the first so many rows; all of them when left out"
    )


class Regression(Strict):
    """A JSONL file of prompts with checks."""

    cases: str


class Gate(Strict):
    """One bound on one metric."""

    metric: str
    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _has_a_bound(self) -> Gate:
        if self.min is None and self.max is None:
            raise ValueError("a gate needs min, max or both")
        return self


class Suite(Versioned):
    """How an artifact is judged."""

    likelihood: Likelihood
    regression: Regression | None = None
    gates: list[Gate] = Field(default=[])


class LoadedSuite(BaseModel):
    """A suite together with the file it came from, which its paths are relative to."""

    suite: Suite
    path: Path

    def resolve(self, relative: str) -> Path:
        return (self.path.parent / relative).resolve()


def load_suite(name_or_path: str) -> LoadedSuite:
    """Load a shipped suite by name or any suite by path."""
    path = find(name_or_path, resources.suites(), "suite")
    return LoadedSuite(suite=validate(Suite, read_yaml(path), path), path=path)
