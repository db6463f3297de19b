"""The results as Markdown: a table for each job on each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.peers.jobs import JOBS, TITLES
from benchmarks.peers.runs import Run

COLUMNS = [
    "| tool | runs | wall s | CPU s | peak GB | MB | bits | wall × | CPU × | peak × |",
    "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
]
INTRODUCTION = (
    "Made by `make bench-peers`. Each run is a whole process: load, quantize, save. Medians of "
    "the runs (the range of the wall times in brackets); peak: resident memory of the largest "
    "process, in the worst run. Bits: of the weights' files, over all parameters. "
    "Ratios: quantkit ÷ the tool; below 1 quantkit needs less. Quality on trained models, by "
    "`quality.py`: [QUALITY.md](QUALITY.md), a Llama, and "
    "[QUALITY-gpt-neox.md](QUALITY-gpt-neox.md)."
)


@dataclass(frozen=True)
class Figures:
    """A tool on a job over its runs. Times in seconds, sizes in bytes.

    wall, cpu: medians; low, high: the range of the wall times; peak: the largest of all runs.
    error: the first failure's message, None when no run failed.
    """

    wall: float
    low: float
    high: float
    cpu: float
    peak: int
    weights: int
    error: str | None

    @staticmethod
    def of(runs: Sequence[Run]) -> Figures:
        walls = [run.wall for run in runs]
        return Figures(
            wall=median(walls),
            low=min(walls),
            high=max(walls),
            cpu=median(run.cpu for run in runs),
            peak=max(run.peak for run in runs),
            weights=runs[-1].weights,
            error=next((run.error for run in runs if run.error), None),
        )


def render(setting: Mapping[str, Any], runs: Sequence[Run]) -> str:
    """The whole page. ``setting``: as benchmarks/peers/setting.py describes it."""
    host = setting["machine"]
    lines = [
        "# quantkit and its peers",
        "",
        INTRODUCTION,
        "",
        f"{setting['date']} · {host['processor']}, {host['cores']} cores, "
        f"{host['memory_bytes'] / 2**30:.0f} GiB · {host['system']} · Python "
        f"{host['python']} · device {host['device']} · load at the start {host['load']}"
        + "".join(f" · {name}={value}" for name, value in host["variables"].items()),
        "",
        "| environment | versions |",
        "|---|---|",
        *(f"| {name} | {version} |" for name, version in setting["versions"].items()),
    ]
    for model, device in dict.fromkeys((run.model, run.device) for run in runs):
        on_model = [run for run in runs if (run.model, run.device) == (model, device)]
        size = on_model[0].parameters / 1e6
        lines += ["", f"## {model} ({size:,.1f} million parameters), {device}"]
        for job in JOBS:
            if on_job := [run for run in on_model if run.job == job]:
                lines += ["", f"### {TITLES[job]}", "", *table(job, on_job)]
    return "\n".join(lines) + "\n"


def table(job: str, runs: Sequence[Run]) -> list[str]:
    """The lines of one job's table on one model, with the remarks below it."""
    by_tool = {tool.name: [run for run in runs if run.tool == tool.name] for tool in JOBS[job]}
    present = [tool for tool in JOBS[job] if by_tool[tool.name]]
    figures = {tool.name: Figures.of(by_tool[tool.name]) for tool in present}
    own = [figures[tool.name] for tool in present if tool.is_ours]
    lines = list(COLUMNS)
    for tool in present:
        it, count = figures[tool.name], len(by_tool[tool.name])
        if it.error:
            lines.append(f"| {tool.name} | {count} | {it.error.replace('|', '/')} {'| ' * 8}")
            continue
        wall = f"{it.wall:.1f}" + (f" ({it.low:.1f}–{it.high:.1f})" if count > 1 else "")
        cells = [wall, f"{it.cpu:.1f}", f"{it.peak / 1e9:.2f}"]
        cells += [f"{it.weights / 1e6:,.1f}", f"{8 * it.weights / runs[0].parameters:.2f}"]
        if tool.is_ours:
            cells += [""] * 3
        else:
            cells += [ratios(own, it, what) for what in ("wall", "cpu", "peak")]
        lines.append(f"| {tool.name} | {count} | {' | '.join(cells)} |")
    if len(own) > 1:
        lines += ["", f"Ratios: of {' / '.join(t.name for t in present if t.is_ours)}."]
    notes = [f"* {tool.name}: {tool.note}." for tool in present if tool.note]
    return [*lines, "", *notes] if notes else lines


def ratios(own: Sequence[Figures], theirs: Figures, what: str) -> str:
    """Our figure over theirs, one ratio for each of our tools; a dash for one that failed."""
    cells = ["–" if it.error else f"{getattr(it, what) / getattr(theirs, what):.2f}" for it in own]
    return " / ".join(cells)
