"""Suites: versioned YAML files that say how an artifact is judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, model_validator

from quantkit.base import resources
from quantkit.documents.content import locate_file
from quantkit.documents.dataset import Dataset, DatasetKey, resolve_dataset
from quantkit.documents.document import (
    Strict,
    Versioned,
    directory_of,
    find_document,
    read_yaml,
    validate,
)
from quantkit.results.metrics import INTERVAL_METRICS, METRICS, has_interval, is_metric


class Likelihood(Strict):
    """Held-out text for perplexity and KL divergence."""

    dataset: DatasetKey
    sequence_length: Annotated[int, Field(ge=8)] = 512
    rows: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description="how many rows, from the first one on; all when left out"
    )
    bos: bool = Field(
        default=False,
        description="begin rows and documents as the tokenizer begins a text: with BOS, if it adds "
        "one",
    )


class Regression(Strict):
    """A JSONL file of prompts with checks."""

    cases: str
    slice_cases: Annotated[int, Field(ge=1)] = Field(
        default=5, description="a tag with fewer cases is no slice for the worst slice"
    )


class HarnessSection(Strict):
    """Tasks of lm-evaluation-harness."""

    tasks: Annotated[list[str], Field(min_length=1)]
    limit: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="how many samples of each task, from the first one on"
    )
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="examples before each sample; the task's own number if unset"
    )
    include_path: str | None = Field(
        default=None, description="folder of further tasks, relative to the suite"
    )
    apply_chat_template: bool = False


class Gate(Strict):
    """Bounds on one metric, inclusive."""

    metric: str
    min: float | None = None
    max: float | None = None
    confidence: Annotated[float, Field(ge=0.5, le=0.999)] | None = Field(
        default=None,
        description="of the interval to compare with the bounds; the figure itself when left out",
    )

    @model_validator(mode="after")
    def _is_possible(self) -> Gate:
        if not is_metric(self.metric):
            raise ValueError(f"no such metric: {self.metric}; metrics: {_metric_list(METRICS)}")
        if self.min is None and self.max is None:
            raise ValueError("a gate needs min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"{self.metric}: min {self.min} is above max {self.max}")
        if self.confidence is not None and not has_interval(self.metric):
            raise ValueError(
                f"{self.metric} has no interval, so its gate can't have a confidence; "
                f"metrics that have one: {_metric_list(INTERVAL_METRICS)}"
            )
        return self


def _metric_list(metrics: Sequence[str]) -> str:
    return f"{', '.join(metrics)}, and regression.tags.TAG.pass_rate and the like"


class Suite(Versioned):
    """How an artifact is judged, as a suite's YAML file has it."""

    likelihood: Likelihood
    regression: Regression | None = None
    harness: HarnessSection | None = None
    gates: list[Gate] = Field(default=[])

    @model_validator(mode="after")
    def _harness_gates_have_tasks(self) -> Suite:
        for gate in self.gates:
            if gate.metric.startswith("harness.") and self.harness is None:
                raise ValueError(f"gate {gate.metric} needs a harness section")
        return self


@dataclass(frozen=True)
class HarnessTasks:
    """A suite's tasks of lm-evaluation-harness.

    limit: samples of each task, None: all; num_fewshot: examples before each sample, None: the
    task's own number; directory: of the suite's own tasks, beside those that lm-eval brings.
    """

    names: tuple[str, ...]
    limit: int | None
    num_fewshot: int | None
    directory: Path | None
    apply_chat_template: bool


class LoadedSuite(BaseModel):
    """A suite together with the file it came from, which its paths are relative to."""

    suite: Suite
    path: Path

    def resolve(self, relative: str) -> Path:
        """The absolute path of one that the suite's file names."""
        return locate_file(relative, directory_of(self.path))

    def harness_tasks(self) -> HarnessTasks | None:
        section = self.suite.harness
        if section is None:
            return None
        directory = None if section.include_path is None else self.resolve(section.include_path)
        return HarnessTasks(
            tuple(section.tasks),
            section.limit,
            section.num_fewshot,
            directory,
            section.apply_chat_template,
        )

    def likelihood_dataset(self) -> Dataset:
        return resolve_dataset(self.suite.likelihood.dataset, directory_of(self.path))


def load_suite(name_or_path: str) -> LoadedSuite:
    """Load a shipped suite by name or any suite by path.

    Raises InputError for no such suite, and for a mistake in it, by file and key.
    """
    path = find_document(name_or_path, resources.suites(), "suite")
    return LoadedSuite(suite=validate(Suite, read_yaml(path), path), path=path)
