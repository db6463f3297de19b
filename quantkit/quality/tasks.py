"""What tasks of lm-evaluation-harness gave, on either side of a comparison."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


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

    def metric(self, name: str) -> float | None:
        if name in ("broken", "fixed"):
            return float(getattr(self, name)) if self.samples else None
        return self.metrics.get(name)


@dataclass(frozen=True)
class HarnessResult:
    """Tasks of lm-evaluation-harness."""

    tasks: tuple[TaskResult, ...]

    def metric(self, name: str) -> float | None:
        """A metric by ``TASK.METRIC``; None when it wasn't measured."""
        for task in self.tasks:
            if name.startswith(f"{task.task}."):
                value = task.metric(name.removeprefix(f"{task.task}."))
                if value is not None:
                    return value
        return None

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {**asdict(task), "broken": task.metric("broken"), "fixed": task.metric("fixed")}
            for task in self.tasks
        ]
