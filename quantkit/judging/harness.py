"""lm-evaluation-harness: its tasks, its requests and its metrics, on a model that we loaded.

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
class Ran:
    """One model's run. metrics and samples by task, as lm-eval gives them; versions of tasks."""

    metrics: dict[str, dict[str, float]]
    samples: dict[str, list[dict[str, Any]]]
    versions: dict[str, str]


class Harness:
    """Tasks, found and loaded before any model is."""

    def __init__(self, tasks: HarnessTasks, *, allow_code: bool = False) -> None:
        """Raises MachineError without lm-eval or the data, InputError for what it can't load.

        allow_code: whether Python in ``tasks.directory`` may run.
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
        if tasks.directory is not None:  # lm-eval's own thousands take seconds to list
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
                fix="lm-eval ls tasks lists them; include_path adds a folder of your own.",
            )

    def check_metrics(self, gates: Sequence[str]) -> None:
        """Raise InputError for a gate on what these tasks don't measure. Loads their data."""
        known = self.metrics()
        for gate in gates:
            if gate.startswith("harness.") and gate not in known:
                raise InputError(
                    f"no such metric: {gate}",
                    where="gates",
                    fix=f"The suite's tasks have {', '.join(sorted(known))}.",
                )

    def metrics(self) -> set[str]:
        """Every metric that a gate may bound. Loads the tasks' data."""
        found = set()
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
                found |= {f"harness.{name}.{_metric(f'{metric},{f}')}" for f in filters}
            found |= {f"harness.{name}.{count}" for count in PAIRED}
        for name, group in loaded["groups"].items():
            for aggregate in group.aggregate_metric_list or ():
                filters = aggregate.filter_list or ["none"]
                found |= {f"harness.{name}.{_metric(f'{aggregate.metric},{f}')}" for f in filters}
        return found

    def run(
        self, model: Any, tokenizer: Any, advance: Callable[[str], None] = lambda doing: None
    ) -> Ran:
        """Run the tasks on a transformers model. ``advance`` is told how far it is."""
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
        return Ran(
            {name: _numbers(values) for name, values in measured.items()},
            results["samples"],
            {name: str(version) for name, version in results.get("versions", {}).items()},
        )

    def _load(self) -> Any:
        """The tasks with their data; fresh ones, since they keep what a model answered."""
        # A task's data_files are relative to its folder, as they are for whoever runs lm-eval there
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
        except Exception as error:  # a task's file may ask for anything
            raise InputError(
                f"lm-eval can't load the tasks ({type(error).__name__}: {error})",
                where="harness.tasks",
            ) from error


def _outermost(loaded: Any) -> list[Any]:
    """The groups and tasks that aren't in a group: what lm-eval takes each of just once."""
    groups = list(loaded["groups"].values())
    inner = {group.name for outer in groups for group in outer.get_all_groups()}
    grouped = {task.task_name for group in groups for task in group.get_all_tasks()}
    tasks = [task for name, task in loaded["tasks"].items() if name not in grouped]
    return [*tasks, *(group for group in groups if group.name not in inner)]


def compare(mine: Ran, theirs: Ran) -> HarnessResult:
    """Pair what two models made of the same samples. ``theirs``: the baseline's."""
    return HarnessResult(
        tuple(
            TaskResult(
                name,
                theirs.versions.get(name, ""),
                metrics,
                theirs.metrics[name],
                tuple(_pair(mine.samples.get(name, []), theirs.samples.get(name, []))),
            )
            for name, metrics in mine.metrics.items()
        )
    )


def _pair(mine: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> list[SampleOutcome]:
    """Samples side by side, under the first filter; none where nothing is right or wrong."""
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
                int(here["doc_id"]),
                here["doc_hash"],
                metric,
                float(here[metric]),
                float(there[metric]),
                _said(here),
                _said(there),
            )
        )
    return outcomes


def _said(sample: dict[str, Any]) -> str:
    """What a model answered, as JSON: text, or the log-likelihood of each option."""
    return json.dumps(sample["filtered_resps"], ensure_ascii=False, default=str)


def _metric(key: str) -> str:
    """lm-eval's ``acc,none`` as gates name it: without the filter that does nothing."""
    return key.removesuffix(",none")


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {
        _metric(key): float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and "," in key
    }


def _check_directory(directory: Path, allow_code: bool) -> None:
    if not directory.is_dir():
        raise InputError("no such folder", where=f"harness.include_path {directory}")
    code = [
        path
        for path in sorted(directory.rglob("*.yaml"))
        if "!function" in path.read_text(encoding="utf-8", errors="replace")
    ]
    if code and not allow_code:
        raise InputError(
            "runs code of the suite (!function)",
            subject=str(code[0]),
            fix="Read it, then pass --allow-code.",
        )


def _wrap(model: Any, tokenizer: Any, advance: Callable[[str], None]) -> Any:
    """The model as lm-eval sees it, which says how many requests it has answered."""
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
            return {}  # there is nothing of this model to look up on the hub

    return Wrapped(pretrained=model, tokenizer=tokenizer, batch_size=_BATCH)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Keep lm-eval from drawing bars into ours: there is no switch for the one over contexts."""
    from lm_eval.api import task

    kept = task.tqdm
    task.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        task.tqdm = kept


class _Counter:
    """Stands where lm-eval's cache is told of each answer."""

    def __init__(self, total: int, advance: Callable[[str], None]) -> None:
        self._total, self._advance, self._done = total, advance, 0

    def add_partial(self, attr: str, request: Any, answer: Any) -> None:
        self._done += 1
        self._advance(f"harness: {self._done} of {self._total} requests")
