"""The tables below the main one: all gates, and the regression cases by tag."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from quantkit.reports.cells import allowed, ends, measured, to_decide
from quantkit.results.comparison import Comparison, Variant
from quantkit.results.quality import Interval, Slice


@dataclass(frozen=True)
class Detail:
    """A small table of text. note: a line below it, or empty."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str


def details(comparison: Comparison) -> list[Detail]:
    """The tables that have any rows."""
    variants = comparison.variants
    tables = (_gates(variants), experts_table(comparison.models), slice_table(variants))
    return [table for table in tables if table.rows]


def _gates(variants: Sequence[Variant]) -> Detail:
    gates = [(variant.name, gate) for variant in variants for gate in variant.gates]
    rows = tuple(
        (
            name,
            gate.metric,
            measured(gate),
            ends(gate),
            allowed(gate),
            gate.verdict.value,
            to_decide(gate),
        )
        for name, gate in gates
    )
    headers = ("model", "metric", "measured", "interval", "allowed", "", "to decide it")
    note = "A gate with an interval passes if all of it is within the bounds, and fails if none is."
    any_interval = any(gate.interval is not None for _, gate in gates)
    return Detail("Gates", headers, rows, note if any_interval else "")


def experts_table(models: Sequence[Variant]) -> Detail:
    """The share of tokens with other experts than in the baseline, layers down, models across."""
    shares = {
        model.name: model.quality.experts_changed.layers
        for model in models
        if model.quality and model.quality.experts_changed
    }
    layers = sorted({int(layer) for of in shares.values() for layer in of})
    rows = tuple(
        (str(layer), *(f"{100 * of[str(layer)]:.2f}%" for of in shares.values()))
        for layer in layers
    )
    note = "A token counts where at least one of the experts that it is sent to is another."
    return Detail("Tokens with other experts, by layer", ("layer", *shares), rows, note)


def slice_table(variants: Sequence[Variant]) -> Detail:
    """All cases, and the tags in which a case was broken or fixed."""
    rows = tuple(
        (
            name,
            part.tag or "all cases",
            f"{part.passed}/{part.total}",
            _range(part.pass_rate),
            f"{100 * (part.passed - part.baseline_passed) / part.total:+.1f}%",
            _range(part.difference),
            f"{part.broken} / {part.fixed}",
            f"{part.p_value:.3f}",
        )
        for name, part in _changed(variants)
    )
    headers = ("model", "tag", "passed", "95%", "to the baseline", "95%", "broken / fixed", "p")
    note = (
        "95%: the interval of the figure before it. Broken cases pass by the baseline alone, fixed "
        "ones by the artifact alone; tags without either are left out. p: McNemar's exact test."
    )
    return Detail("Regression cases by tag", headers, rows, note)


def _changed(variants: Sequence[Variant]) -> Iterator[tuple[str, Slice]]:
    for variant in variants:
        for part in variant.quality.slices if variant.quality else ():
            if part.tag is None or part.broken or part.fixed:
                yield variant.name, part


def _range(interval: Interval) -> str:
    return f"{100 * interval.low:.1f} to {100 * interval.high:.1f}%"
