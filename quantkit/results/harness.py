"""Results of lm-evaluation-harness tasks, beside the baseline's."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# Metrics of ours that every task with samples has beside lm-eval's own.
PAIRED = ("broken", "fixed", "difference")


@dataclass(frozen=True)
class SampleOutcome:
    """One sample of a task, answered by both models.

    doc_hash: lm-eval's hash of the document; metric: what decides whether an answer is right;
    value, baseline_value: 1 where it is right, 0 where it is not; response: the filtered
    response as JSON.
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
    """A task or a group of tasks: the metrics of both models, by lm-eval's names.

    samples: empty for a group, and for a task whose samples are neither right nor wrong.
    """

    task: str
    version: str
    metrics: dict[str, float]
    baseline_metrics: dict[str, float]
    samples: tuple[SampleOutcome, ...]

    @property
    def broken(self) -> int:
        """How many samples the baseline gets right and this model gets wrong."""
        return sum(sample.value < sample.baseline_value for sample in self.samples)

    @property
    def fixed(self) -> int:
        """How many samples the baseline gets wrong and this model gets right."""
        return sum(sample.value > sample.baseline_value for sample in self.samples)

    @property
    def difference(self) -> float:
        """The share of samples that are right, minus the baseline's share."""
        return (self.fixed - self.broken) / len(self.samples)

    def metric(self, name: str) -> float | None:
        """A metric by lm-eval's name, or one of ``PAIRED``; None where it wasn't measured."""
        if name in PAIRED:
            return float(getattr(self, name)) if self.samples else None
        return self.metrics.get(name)


@dataclass(frozen=True)
class HarnessResult:
    """All tasks of lm-evaluation-harness that a suite runs."""

    tasks: tuple[TaskResult, ...]

    def split(self, name: str) -> tuple[TaskResult, str] | None:
        """``TASK.METRIC`` as the task and the metric's name; None where there is no such task."""
        for task in self.tasks:
            if name.startswith(f"{task.task}."):
                return task, name.removeprefix(f"{task.task}.")
        return None

    def metric(self, name: str) -> float | None:
        """A metric by ``TASK.METRIC``; None when it wasn't measured."""
        parts = self.split(name)
        return parts[0].metric(parts[1]) if parts else None

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {**asdict(task), **{name: task.metric(name) for name in PAIRED}} for task in self.tasks
        ]
