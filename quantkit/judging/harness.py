"""lm-evaluation-harness: its tasks and its metrics, on a model that is loaded already.

https://github.com/EleutherAI/lm-evaluation-harness (``lm_eval.simple_evaluate``, ``HFLM``).
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.base.errors import InputError, MachineError, not_installed
from quantkit.recipes.suite import HarnessTasks
from quantkit.results.harness import PAIRED, HarnessResult, SampleOutcome, TaskResult

# Metrics whose samples are right or wrong; the first that a task has decides what broke.
_RIGHT_OR_WRONG = ("acc", "exact_match", "em", "pass@1", "acc_norm", "acc_mutual_info")
_BATCH = 16


@dataclass(frozen=True)
class HarnessRun:
    """What lm-eval returned for one model, by task: metrics, samples, and the tasks' versions."""

    metrics: dict[str, dict[str, float]]
    samples: dict[str, list[dict[str, Any]]]
    versions: dict[str, str]


class Harness:
    """The harness tasks of a suite, looked up before any model is loaded."""

    def __init__(self, tasks: HarnessTasks, *, allow_code: bool = False) -> None:
        """Raises MachineError without lm-eval, InputError for tasks that it doesn't know.

        allow_code: whether Python in ``tasks.directory``, or that a model writes, may run.
        """
        self.tasks = tasks
        self._allow_code = allow_code
        if tasks.directory is not None:
            _check_directory(tasks.directory, allow_code)
        try:
            import datasets
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise not_installed("lm-eval", "harness") from None
        datasets.disable_progress_bars()
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self._manager: Any = None
        if tasks.directory is not None:
            # The suite's own folder first and alone: lm-eval's thousands of tasks take seconds.
            own = TaskManager(include_path=str(tasks.directory), include_defaults=False)
            if set(tasks.names) <= set(own.all_subtasks):
                self._manager = own
        if self._manager is None:
            include = None if tasks.directory is None else str(tasks.directory)
            self._manager = TaskManager(include_path=include)
        if unknown := [name for name in tasks.names if name not in self._manager.all_tasks]:
            raise InputError(
                f"lm-eval knows no task {', '.join(unknown)}",
                where="harness.tasks",
                fix="List its tasks with lm-eval ls tasks, or name a folder of your own as "
                "include_path.",
            )

    def check_metrics(self, gates: Sequence[str]) -> None:
        """Raise InputError for a gate on what these tasks don't measure; ``gates`` are metrics.

        Loads the tasks' data, as ``metrics`` does.
        """
        known = self.metrics()
        for gate in gates:
            if gate.startswith("harness.") and gate not in known:
                raise InputError(
                    f"the suite's tasks don't measure {gate}",
                    where="gates",
                    fix=f"They measure {', '.join(sorted(known))}.",
                )

    def metrics(self) -> set[str]:
        """The names of all metrics that a gate may bound.

        Loads the tasks' data. Raises InputError for a task that runs code which the model writes,
        unless code is allowed.
        """
        names = set()
        loaded = self._load()
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) and not self._allow_code:
                raise InputError(
                    f"{name} runs code that the model writes",
                    where="harness.tasks",
                    fix="Run it where that can do no harm, and pass --allow-code.",
                )
            filters = [f.name for f in getattr(task, "_filters", [])] or ["none"]
            for metric in task.aggregation():
                names |= {f"harness.{name}.{_metric(f'{metric},{f}')}" for f in filters}
            names |= {f"harness.{name}.{count}" for count in PAIRED}
        for name, group in loaded["groups"].items():
            for aggregate in group.aggregate_metric_list or ():
                filters = aggregate.filter_list or ["none"]
                names |= {f"harness.{name}.{_metric(f'{aggregate.metric},{f}')}" for f in filters}
        return names

    def run(
        self, model: Any, tokenizer: Any, advance: Callable[[str], None] = lambda doing: None
    ) -> HarnessRun:
        """Run the tasks on a transformers model; ``advance`` gets a line of progress at times."""
        import lm_eval

        loaded = self._load()
        with _no_bars():
            results = lm_eval.simple_evaluate(
                model=_wrap(model, tokenizer, advance),
                tasks=_outermost(loaded),
                num_fewshot=self.tasks.num_fewshot,
                limit=self.tasks.limit,
                apply_chat_template=self.tasks.apply_chat_template,
                log_samples=True,
                task_manager=self._manager,
                confirm_run_unsafe_code=self._allow_code,
            )
        measured = {**results["results"], **results.get("groups", {})}
        return HarnessRun(
            {name: _numbers(values) for name, values in measured.items()},
            results["samples"],
            {name: str(version) for name, version in results.get("versions", {}).items()},
        )

    def _load(self) -> Any:
        """New task objects with their data."""
        # They can't be kept for the next model, since they hold what a model has answered.
        # lm-eval reads a task's data_files from the working directory, which people who run it
        # themselves set to the tasks' folder.
        directory = self.tasks.directory
        inside = contextlib.nullcontext() if directory is None else contextlib.chdir(directory)
        try:
            with inside:
                return self._manager.load(list(self.tasks.names))
        except (ConnectionError, TimeoutError) as error:
            raise MachineError(
                f"the tasks' data can't be downloaded ({type(error).__name__}: {error})",
                where="harness.tasks",
            ) from error
        except Exception as error:  # a task's file may name any class or function
            raise InputError(
                f"lm-eval can't load the tasks ({type(error).__name__}: {error})",
                where="harness.tasks",
            ) from error


def _outermost(loaded: Any) -> list[Any]:
    """The groups and tasks that are in no other group."""
    # lm-eval would run a task twice that it got both by itself and in a group.
    groups = list(loaded["groups"].values())
    inner = {group.name for outer in groups for group in outer.get_all_groups()}
    grouped = {task.task_name for group in groups for task in group.get_all_tasks()}
    tasks = [task for name, task in loaded["tasks"].items() if name not in grouped]
    return [*tasks, *(group for group in groups if group.name not in inner)]


def pair_runs(run: HarnessRun, baseline: HarnessRun) -> HarnessResult:
    """The results of both models side by side; ``baseline`` ran the same tasks.

    Raises RuntimeError where their samples aren't the same.
    """
    return HarnessResult(
        tuple(
            TaskResult(
                task=name,
                version=baseline.versions.get(name, ""),
                metrics=metrics,
                baseline_metrics=baseline.metrics[name],
                samples=tuple(_pair(run.samples.get(name, []), baseline.samples.get(name, []))),
            )
            for name, metrics in run.metrics.items()
        )
    )


def _pair(mine: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> list[SampleOutcome]:
    """The samples of both models, under the task's first filter.

    Empty where the task has no metric by which a sample is right or wrong.
    """
    pairs = list(zip(mine, theirs, strict=True))
    if not pairs:
        return []
    metric = next((name for name in _RIGHT_OR_WRONG if name in mine[0]), None)
    if metric is None:
        return []
    outcomes = []
    for here, there in pairs:
        if here["doc_hash"] != there["doc_hash"] or here["prompt_hash"] != there["prompt_hash"]:
            raise RuntimeError(f"sample {here['doc_id']} isn't the same on both sides")
        if here["filter"] != mine[0]["filter"]:
            continue
        outcomes.append(
            SampleOutcome(
                doc_id=int(here["doc_id"]),
                doc_hash=here["doc_hash"],
                metric=metric,
                value=float(here[metric]),
                baseline_value=float(there[metric]),
                response=_response(here),
                baseline_response=_response(there),
            )
        )
    return outcomes


def _response(sample: dict[str, Any]) -> str:
    """A model's response as JSON: text, or the log-likelihood of each option."""
    return json.dumps(sample["filtered_resps"], ensure_ascii=False, default=str)


def _metric(key: str) -> str:
    """lm-eval's ``METRIC,FILTER`` as gates name it: without the filter ``none``."""
    return key.removesuffix(",none")


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {
        _metric(key): float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and "," in key
    }


def _check_directory(directory: Path, allow_code: bool) -> None:
    if not directory.is_dir():
        raise InputError(f"there is no folder {directory}", where="harness.include_path")
    code = [
        path
        for path in sorted(directory.rglob("*.yaml"))
        if "!function" in path.read_text(encoding="utf-8", errors="replace")
    ]
    if code and not allow_code:
        raise InputError(
            "runs code of the suite (!function)",
            subject=str(code[0]),
            fix="Read that code, then pass --allow-code.",
        )


def _wrap(model: Any, tokenizer: Any, advance: Callable[[str], None]) -> Any:
    """The model as lm-eval's HFLM, which reports to ``advance`` how many requests are answered."""
    from lm_eval.models.huggingface import HFLM

    class Wrapped(HFLM):
        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            self.cache_hook = _Counter(len(requests), advance)
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            self.cache_hook = _Counter(len(requests), advance)
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            self.cache_hook = _Counter(len(requests), advance)
            return super().generate_until(requests, disable_tqdm=True)

        def get_model_info(self) -> dict[str, Any]:
            return {}  # HFLM's own would look the model up on the hub

    return Wrapped(pretrained=model, tokenizer=tokenizer, batch_size=_BATCH)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Keep lm-eval's progress bar off the terminal, where it would garble ours."""
    # lm-eval has no switch for the bar that it draws while it builds contexts.
    from lm_eval.api import task

    kept = task.tqdm
    task.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        task.tqdm = kept


class _Counter:
    """In place of lm-eval's cache, which gets each answer as soon as it is there."""

    def __init__(self, total: int, advance: Callable[[str], None]) -> None:
        self._total, self._advance, self._done = total, advance, 0

    def add_partial(self, attr: str, request: Any, answer: Any) -> None:
        self._done += 1
        self._advance(f"harness: {self._done} of {self._total} requests")
