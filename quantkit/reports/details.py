"""What stands below the main table: each gate with its interval, and the slices that moved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from quantkit.reports.cells import allowed, ends, further, measured
from quantkit.results.comparison import Comparison, Variant
from quantkit.results.quality import Interval, Slice


@dataclass(frozen=True)
class Detail:
    """A small table of text cells. note: a line below it."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str


def details(comparison: Comparison) -> list[Detail]:
    """The tables that there is something to say in."""
    found = (_gates(comparison.variants), slices(comparison.variants))
    return [detail for detail in found if detail.rows]


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
            further(gate),
        )
        for name, gate in gates
    )
    headers = ("model", "metric", "measured", "interval", "allowed", "", "would decide")
    note = "An interval must lie wholly within its bounds to pass, and wholly outside to fail."
    certain = all(gate.interval is None for _, gate in gates)
    return Detail("Gates", headers, rows, "" if certain else note)


def slices(variants: Sequence[Variant]) -> Detail:
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
        for name, part in _moved(variants)
    )
    headers = ("model", "slice", "passed", "95%", "to the baseline", "95%", "broken / fixed", "p")
    note = "Tags in which no case was broken or fixed are left out. p: McNemar's exact test."
    return Detail("Regression cases by tag", headers, rows, note)


def _moved(variants: Sequence[Variant]) -> Iterator[tuple[str, Slice]]:
    for variant in variants:
        for part in variant.quality.slices if variant.quality else ():
            if part.tag is None or part.broken or part.fixed:
                yield variant.name, part


def _range(found: Interval) -> str:
    return f"{100 * found.low:.1f} to {100 * found.high:.1f}%"
