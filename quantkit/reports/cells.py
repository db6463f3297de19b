"""The comparison as a table of text, the same in every report: figures down, models across."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.results.comparison import Comparison, Variant
from quantkit.results.harness import TaskResult
from quantkit.results.metrics import EXPERTS_MEAN
from quantkit.results.regression import CaseOutcome
from quantkit.results.verdict import GateOutcome, Verdict

Cell = Callable[[Variant], str | None]


@dataclass(frozen=True)
class Row:
    """One figure of all models. better: an arrow to the better direction, or empty."""

    label: str
    better: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """Rows under one title."""

    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Grid:
    """The whole table. headers: the models' names; a row has one cell for each of them."""

    headers: tuple[str, ...]
    sections: tuple[Section, ...]


def table(models: Sequence[Variant]) -> Grid:
    """The models side by side. Rows in which nothing was measured are left out."""
    sections = []
    for title, figures in _SECTIONS.items():
        rows = []
        for label, better, cell in figures + (_tasks(models) if title == "Quality" else []):
            cells = tuple(cell(model) for model in models)
            if any(cells):
                rows.append(Row(label, better, tuple(text or "–" for text in cells)))
        if rows:
            sections.append(Section(title, tuple(rows)))
    return Grid(tuple(model.name for model in models), tuple(sections))


def notes(comparison: Comparison) -> list[str]:
    """What to know beside the table: differences, missing figures, failed gates, broken cases."""
    lines = [f"Differs: {text}" for text in comparison.differences]
    lines += [f"Missing: {text}" for text in missing(comparison.models)]
    for variant in comparison.variants:
        for gate in variant.gates:
            if not gate.passed:
                outcome = "Failed" if gate.verdict is Verdict.FAIL else "Undecided"
                lines.append(f"{outcome}: {variant.name}, {gate_sentence(gate)}")
        if variant.verdict is Verdict.FAIL and variant.localization is None:
            lines.append(f"To fix: --locate finds the layers where {variant.name} loses most")
        regression = variant.quality.regression if variant.quality else None
        for case in regression.cases if regression else ():
            if case.baseline_passed and not case.passed:
                mark = " (critical)" if case.critical else ""
                why = f" ({failures(case)})" if case.checks else ""
                lines.append(
                    f"Broken: {variant.name}, {case.id}{mark}: "
                    f"{case.baseline_answer.strip()!r} became {case.answer.strip()!r}{why}"
                )
    lines.append(f"Way back: {comparison.way_back}")
    return lines


def gate_sentence(gate: GateOutcome) -> str:
    """A gate in a sentence: what was measured, what is allowed, what would decide it."""
    interval = f" ({ends(gate)})" if gate.interval else ""
    more = f"; to decide it: {to_decide(gate)}" if to_decide(gate) else ""
    return f"{gate.metric} is {measured(gate)}{interval}, allowed {allowed(gate)}{more}"


def failures(case: CaseOutcome) -> str:
    """The checks that an answer fails, each with the reason."""
    return "; ".join(f"{check.check}: {check.why}" for check in case.checks if not check.passed)


def missing(models: Sequence[Variant]) -> list[str]:
    """The figures that an engine couldn't give, each with the reason."""
    return [
        f"{model.name}, {figure}: {reason}"
        for model in models
        for figure, reason in (model.cost.missing if model.cost else {}).items()
    ]


def allowed(gate: GateOutcome) -> str:
    """A gate's bounds in words."""
    bounds = (("at least", gate.min), ("at most", gate.max))
    return ", ".join(f"{word} {bound:.12g}" for word, bound in bounds if bound is not None)


def measured(gate: GateOutcome) -> str:
    """The value of a gate's metric."""
    return "not measured" if gate.value is None else f"{gate.value:.6g}"


def ends(gate: GateOutcome) -> str:
    """The interval of a gate's metric, where the gate asks for confidence."""
    interval = gate.interval
    if interval is None:
        return ""
    return f"{interval.low:.6g} to {interval.high:.6g} at {100 * interval.confidence:g}%"


def to_decide(gate: GateOutcome) -> str:
    """What would decide an inconclusive gate; empty for any other."""
    if gate.verdict is not Verdict.INCONCLUSIVE or gate.interval is None:
        return ""
    if gate.more is None:
        return "no number of samples is enough, since the value is on the bound"
    return f"about {gate.more:,} more {gate.interval.unit}"


def _tasks(models: Sequence[Variant]) -> list[tuple[str, str, Cell]]:
    """Rows of the harness tasks, which are the same for all models."""
    harness = [model.quality.harness for model in models if model.quality and model.quality.harness]
    rows: list[tuple[str, str, Cell]] = []
    for task in harness[0].tasks if harness else ():
        for metric in task.metrics:
            if "_stderr" not in metric:
                rows.append((f"{task.task} {metric}", "", _task_metric(task.task, metric)))
        if task.samples:
            rows.append((f"{task.task} broken / fixed", "↓", _task_counts(task.task)))
    return rows


def _task(model: Variant, name: str) -> TaskResult | None:
    harness = model.quality.harness if model.quality else None
    return next((task for task in harness.tasks if task.task == name), None) if harness else None


def _task_metric(name: str, metric: str) -> Cell:
    kind, comma, filtered = metric.partition(",")
    error = f"{kind}_stderr{comma}{filtered}"

    def cell(model: Variant) -> str | None:
        task = _task(model, name)
        if task is None or metric not in task.metrics:
            return None
        stderr = task.metrics.get(error)
        return f"{task.metrics[metric]:.4f}" + (f" ± {stderr:.4f}" if stderr is not None else "")

    return cell


def _task_counts(name: str) -> Cell:
    def cell(model: Variant) -> str | None:
        task = _task(model, name)
        if task is None or model.quality is None or model.quality.kl_divergence is None:
            return None
        return f"{task.broken} / {task.fixed}"

    return cell


def _cost(figure: str, text: Callable[[Any], str]) -> Cell:
    """A cell of one figure of the cost."""

    def cell(model: Variant) -> str | None:
        value = getattr(model.cost, figure, None)
        return None if value is None else text(value)

    return cell


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f}"


def _rate(value: float) -> str:
    return f"{value:,.0f}"


def _milliseconds(value: float) -> str:
    return f"{value:,.2f}"


def _perplexity(model: Variant) -> str | None:
    if model.quality is None:
        return None
    return f"{model.quality.perplexity.value:.3f} ± {model.quality.perplexity.stderr:.3f}"


def _interval(metric: str, places: int, factor: float = 1.0, mark: str = "") -> Cell:
    """A cell of a metric's 95% interval, times ``factor``."""

    def cell(model: Variant) -> str | None:
        interval = model.quality.intervals.get(metric) if model.quality else None
        if interval is None:
            return None
        return f"{factor * interval.low:.{places}f}–{factor * interval.high:.{places}f}{mark}"

    return cell


def _ratio(model: Variant) -> str | None:
    ratio = model.quality.perplexity.ratio if model.quality else None
    return None if ratio is None else f"{ratio:.4f}"


def _kl(model: Variant) -> str | None:
    kl = model.quality.kl_divergence if model.quality else None
    return None if kl is None else f"{kl.mean:.5f}"


def _p99(model: Variant) -> str | None:
    kl = model.quality.kl_divergence if model.quality else None
    return None if kl is None else f"{kl.p99:.4f}"


def _agreement(model: Variant) -> str | None:
    value = model.quality.top1_agreement if model.quality else None
    return None if value is None else f"{100 * value:.2f}%"


def _experts(model: Variant) -> str | None:
    changed = model.quality.experts_changed if model.quality else None
    return None if changed is None else f"{100 * changed.mean:.2f}%"


def _cases(model: Variant) -> str | None:
    regression = model.quality.regression if model.quality else None
    return None if regression is None else f"{regression.passed}/{regression.total}"


def _counts(model: Variant) -> str | None:
    """Broken and fixed cases; none for the baseline, which has no KL divergence either."""
    regression = model.quality.regression if model.quality else None
    if regression is None or model.quality is None or model.quality.kl_divergence is None:
        return None
    return f"{regression.broken} / {regression.fixed}"


def _mcnemar(model: Variant) -> str | None:
    if model.quality is None or model.quality.kl_divergence is None or not model.quality.slices:
        return None
    return f"{model.quality.slices[0].p_value:.3f}"


def _verdict(model: Variant) -> str | None:
    return None if model.verdict is None else Verdict(model.verdict).value


def _recipe(model: Variant) -> str | None:
    """The recipe's version, after its name where the row has another one."""
    if model.recipe is None:
        return None
    name, _, version = model.recipe.rpartition(" ")
    return version if name == model.name else model.recipe


_SECTIONS: dict[str, list[tuple[str, str, Cell]]] = {
    "Artifact": [
        ("recipe version", "", _recipe),
        ("method", "", lambda m: m.method),
        ("format", "", lambda m: m.format),
        ("bits per weight", "↓", lambda m: f"{m.bits_per_weight:.3f}"),
        ("size on disk, MB", "↓", lambda m: _megabytes(m.disk_bytes)),
    ],
    "Quality": [
        ("perplexity ± stderr", "↓", _perplexity),
        ("perplexity ratio", "↓", _ratio),
        ("… 95% interval", "", _interval("perplexity.ratio", 4)),
        ("KL divergence", "↓", _kl),
        ("… 95% interval", "", _interval("kl_divergence.mean", 5)),
        ("KL p99", "↓", _p99),
        ("top-1 agreement", "↑", _agreement),
        ("tokens with other experts", "↓", _experts),
        ("… 95% interval", "", _interval(EXPERTS_MEAN, 2, 100, "%")),
        ("cases passed", "↑", _cases),
        ("… 95% interval", "", _interval("regression.pass_rate", 1, 100, "%")),
        ("broken / fixed", "↓", _counts),
        ("… McNemar's p", "", _mcnemar),
    ],
    "Cost": [
        ("engine", "", _cost("engine", str)),
        ("device", "", _cost("device", str)),
        ("weights held, MB", "↓", _cost("weights_bytes", _megabytes)),
        ("process, loaded, MB", "↓", _cost("resident_bytes", _megabytes)),
        ("process, peak, MB", "↓", _cost("peak_bytes", _megabytes)),
        ("GPU, peak, MB", "↓", _cost("device_peak_bytes", _megabytes)),
        ("prefill, tokens/s", "↑", _cost("prefill_tokens_per_second", _rate)),
        ("decode ×1, tokens/s", "↑", _cost("decode_tokens_per_second", _rate)),
        ("decode ×8, tokens/s", "↑", _cost("decode_tokens_per_second_batch8", _rate)),
        ("… ×1 by CUDA graphs", "↑", _cost("decode_tokens_per_second_graphs", _rate)),
        ("… ×8 by CUDA graphs", "↑", _cost("decode_tokens_per_second_batch8_graphs", _rate)),
        ("first token, ms", "↓", _cost("ttft_ms", _milliseconds)),
        ("each token, ms", "↓", _cost("tpot_ms", _milliseconds)),
    ],
    "Verdict": [("gates", "", _verdict)],
}
