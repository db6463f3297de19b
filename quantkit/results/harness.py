"""What tasks of lm-evaluation-harness gave, on either side of a comparison."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

PAIRED = ("broken", "fixed", "difference")


@dataclass(frozen=True)
class SampleOutcome:
    """One sample of a harness task on either side; 1 where ``metric`` calls it right.

    doc_hash: of the document, by lm-eval; response: JSON, as filtered by the task.
    """

    doc_id: int
    doc_hash: str
    metric: str
    value: float
    baseline_value: float
    response: str
    baseline_response: str


@dataclass(frozen=True)
class TaskResult:
    """A task or group of lm-evaluation-harness: its metrics on either side, by lm-eval's names.

    samples: none for a group, or where no sample is right or wrong.
    """

    task: str
    version: str
    metrics: dict[str, float]
    baseline_metrics: dict[str, float]
    samples: tuple[SampleOutcome, ...]

    @property
    def broken(self) -> int:
        """Samples that the baseline gets right, and this doesn't."""
        return sum(sample.value < sample.baseline_value for sample in self.samples)

    @property
    def fixed(self) -> int:
        """Samples that the baseline gets wrong, and this doesn't."""
        return sum(sample.value > sample.baseline_value for sample in self.samples)

    @property
    def difference(self) -> float:
        """Share of samples got right minus the baseline's."""
        return (self.fixed - self.broken) / len(self.samples)

    def metric(self, name: str) -> float | None:
        """A metric by lm-eval's name, or one that compares the sides; None if there is none."""
        if name in PAIRED:
            return float(getattr(self, name)) if self.samples else None
        return self.metrics.get(name)


@dataclass(frozen=True)
class HarnessResult:
    """Tasks of lm-evaluation-harness."""

    tasks: tuple[TaskResult, ...]

    def find(self, name: str) -> tuple[TaskResult, str] | None:
        """``TASK.METRIC`` as the task and its metric; None where there is no such task."""
        for task in self.tasks:
            if name.startswith(f"{task.task}."):
                return task, name.removeprefix(f"{task.task}.")
        return None

    def metric(self, name: str) -> float | None:
        """A metric by ``TASK.METRIC``; None when it wasn't measured."""
        found = self.find(name)
        return found[0].metric(found[1]) if found else None

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {**asdict(task), **{name: task.metric(name) for name in PAIRED}} for task in self.tasks
        ]
