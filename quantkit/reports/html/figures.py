"""The charts of a comparison's page, each with a note on how to read it."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from quantkit.reports.html import charts
from quantkit.reports.html.charts import Axis, Bar, Cell, Point, Rate, Strip
from quantkit.results.comparison import Comparison, Variant
from quantkit.results.manifest import QuantizedManifest
from quantkit.results.quality import KlDivergence, Quality
from quantkit.results.verdict import Verdict

_KL = "KL divergence from the baseline, nats a token"
_BLOCK = re.compile(r"^(?:.*?\.)?(\d+)\.(.+)$")
_MOST_TAGS = 12


@dataclass(frozen=True)
class Panel:
    """One chart. aside: small text beside the heading; note: how to read the chart."""

    heading: str
    chart: Markup
    note: str = ""
    aside: str = ""


def size_panels(comparison: Comparison) -> list[Panel]:
    """Quality against size."""
    points = []
    for row in comparison.variants:
        kl = row.quality.kl_divergence if row.quality else None
        if row.quality and kl and kl.mean > 0:
            low, high = _kl_ends(row.quality, kl)
            point = Point(
                name=row.name,
                x=row.disk_bytes / 1e6,
                y=kl.mean,
                low=low,
                high=high,
                kind=mark_class(row),
            )
            points.append(point)
    if not points:
        return []
    floor = comparison.references[0] if comparison.references else None
    noise = floor.quality.kl_divergence if floor and floor.quality else None
    across = (
        (noise.mean, f"{floor.name}: rounding alone") if floor and noise and noise.mean else None
    )
    chart = charts.scatter(
        "Mean KL divergence against size on disk, by artifact",
        points,
        Axis("size on disk, MB"),
        Axis(_KL, log=True),
        across,
    )
    size = comparison.baseline.disk_bytes / 1e6
    note = (
        "Lower and further left is better. The line is the Pareto front: no artifact is both "
        "smaller and closer to the baseline than one on it. Bars are 95% intervals. "
        f"The baseline itself ({size:,.1f} MB) would be at zero."
    )
    return [Panel("Quality against size", chart, note)]


def divergence_panels(comparison: Comparison) -> list[Panel]:
    """How the KL divergence is spread over the rows of text."""
    rows = []
    for model in (*comparison.references, *comparison.variants):
        quality = model.quality
        if quality is None:
            continue
        kl, sums = quality.kl_divergence, quality.row_sums
        if kl is None or sums is None or not any(value > 0 for value in sums.kl):
            continue
        values = tuple(kl / tokens for kl, tokens in zip(sums.kl, sums.tokens, strict=True))
        low, high = _kl_ends(quality, kl)
        rows.append(
            Strip(
                name=model.name,
                values=values,
                mean=kl.mean,
                low=low,
                high=high,
                label=f"mean {charts.rounded(kl.mean)}",
                kind=mark_class(model),
            )
        )
    if not rows:
        return []
    count = max(len(row.values) for row in rows)
    note = f"One dot a row of text, {count} of them"
    note += f", thinned to {charts.MOST_DOTS} quantiles" if count > charts.MOST_DOTS else ""
    note += "; below the dots the mean and its 95% interval."
    chart = charts.strips("KL divergence of each row of text, by model", rows, Axis(_KL, log=True))
    return [Panel("KL divergence row by row", chart, note)]


def _kl_ends(quality: Quality, kl: KlDivergence) -> tuple[float, float]:
    """The ends of the mean's interval; the mean itself where there is none."""
    interval = quality.kl_interval
    return (interval.low, interval.high) if interval else (kl.mean, kl.mean)


def slice_panels(comparison: Comparison) -> list[Panel]:
    """Pass rates by tag beside the baseline's, in order of falling loss."""
    panels = []
    judged = [(model, model.quality.slices) for model in comparison.variants if model.quality]
    lowest = min((part.pass_rate.low for _, parts in judged for part in parts), default=0.0)
    lowest = max(math.floor(10 * lowest - 0.5) / 10, 0.0)
    for model, parts in judged:
        ordered = sorted(
            parts, key=lambda part: (part.tag is not None, part.passed - part.baseline_passed)
        )
        rows = [
            Rate(
                name=part.tag or "all cases",
                value=part.passed / part.total,
                low=part.pass_rate.low,
                high=part.pass_rate.high,
                baseline=part.baseline_passed / part.total,
                label=f"{part.passed}/{part.total}",
                kind="fail" if part.passed < part.baseline_passed else "artifact",
            )
            for part in ordered[:_MOST_TAGS]
        ]
        if not rows:
            continue
        left_out = len(ordered) - len(rows)
        lost = sum(part.passed < part.baseline_passed for part in ordered[_MOST_TAGS:])
        note = f"{left_out} more tags are in comparison.json" if left_out > 0 else ""
        note += f"; {lost or 'none'} of them lost cases." if note else ""
        title = f"{model.name}: pass rate by tag"
        chart = charts.rates(title, rows, Axis("pass rate"), lowest)
        panels.append(Panel(model.name, chart, note))
    return panels


def cost_panels(comparison: Comparison) -> list[Panel]:
    """Size, memory, latency and throughput, a panel for each figure."""
    panels = []
    for heading, better, value_of, text in _COSTS:
        rows = []
        for model in comparison.models:
            value = value_of(model)
            if value is None and model.cost is None:
                continue
            rows.append(Bar(model.name, value, text(value) if value else "–", mark_class(model)))
        if any(row.value for row in rows):
            panels.append(Panel(heading, charts.bars(heading, rows), aside=f"{better} is better"))
    return panels


def _cost(name: str, factor: float = 1.0) -> Callable[[Variant], float | None]:
    def value(model: Variant) -> float | None:
        figure = getattr(model.cost, name, None)
        return None if figure is None else figure * factor

    return value


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _fine(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:,.2f}"


_COSTS: tuple[tuple[str, str, Callable[[Variant], float | None], Callable[[float], str]], ...] = (
    ("Weights held, MB", "less", _cost("weights_bytes", 1e-6), _fine),
    ("Process at its peak, MB", "less", _cost("peak_bytes", 1e-6), _fine),
    ("Prefill, tokens/s", "more", _cost("prefill_tokens_per_second"), _whole),
    ("Decode, batch 1, tokens/s", "more", _cost("decode_tokens_per_second"), _whole),
    ("Decode, batch 8, tokens/s", "more", _cost("decode_tokens_per_second_batch8"), _whole),
    ("First token, ms", "less", _cost("ttft_ms"), _fine),
)


def layer_panels(comparison: Comparison) -> list[Panel]:
    """The error of every linear, from the manifests: a heat map for each artifact."""
    # Artifacts whose errors are of the same kind share one scale of shades.
    reported = [
        (row, row.manifest.layers)
        for row in comparison.variants
        if isinstance(row.manifest, QuantizedManifest)
    ]
    domains: dict[str, list[float]] = defaultdict(list)
    for _, reports in reported:
        for report in reports:
            domains[report.measured_on].append(report.error)
    panels = []
    for row, reports in reported:
        cells, others = [], []
        changed = [report for report in reports if report.error > 0]
        for report in sorted(changed, key=lambda report: report.name):
            place = _BLOCK.match(report.name)
            if place:
                cells.append(Cell(place[2], int(place[1]), report.error))
            else:
                others.append(f"{report.name} {charts.rounded(report.error)}")
        if not cells:
            continue
        cells = _shorter(cells)
        measured = reports[0].measured_on
        positive = [value for value in domains[measured] if value > 0] or [1.0]
        domain = min(positive), max(positive)
        chart = charts.heat(f"{row.name}: error of every linear by block", cells, domain)
        worst = max(cells, key=lambda cell: cell.value)
        note = (
            f"Relative squared error of {measured}; faintest {charts.rounded(domain[0])}, "
            f"strongest {charts.rounded(domain[1])}. Worst: block {worst.column}, {worst.row}, "
            f"{charts.rounded(worst.value)}."
        )
        note += f" Outside the blocks: {', '.join(others)}." if others else ""
        exact = len(reports) - len(changed)
        note += f" Stored exactly: {exact} more." if exact else ""
        panels.append(Panel(row.name, chart, note))
    return panels


def experts_panels(comparison: Comparison) -> list[Panel]:
    """The share of tokens with other experts than in the baseline: layers across, models down."""
    cells = [
        Cell(model.name, int(layer), share)
        for model in comparison.models
        if model.quality and model.quality.experts_changed
        for layer, share in model.quality.experts_changed.layers.items()
        if share
    ]
    if not cells:
        return []
    domain = min(cell.value for cell in cells), max(cell.value for cell in cells)
    heading = "Share of tokens with other experts by block"
    return [Panel(heading, charts.heat(heading, cells, domain))]


def _shorter(cells: Sequence[Cell]) -> list[Cell]:
    """The same cells with the last part of each row's name, where that is unique."""
    names = {cell.row: cell.row.removesuffix(".weight").rpartition(".")[2] for cell in cells}
    if len(set(names.values())) < len(names):
        return list(cells)
    return [Cell(names[cell.row], cell.column, cell.value) for cell in cells]


def mark_class(model: Variant) -> str:
    """The style sheet's class for the marks of a model."""
    if model.verdict is None:
        return "artifact" if model.method else "reference"
    return {Verdict.FAIL: "fail", Verdict.INCONCLUSIVE: "unsure"}.get(model.verdict, "artifact")
