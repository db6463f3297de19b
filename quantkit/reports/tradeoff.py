"""The trade-off card and the launch checklist of each artifact, filled from evidence alone.

What was gained, given up and kept follows from the comparison's figures. Each item of the checklist
names its evidence; an item without evidence is empty, and says what would give some.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantkit.results.comparison import Comparison, Variant
from quantkit.results.cost import Cost
from quantkit.results.manifest import MANIFEST, CalibrationRecord, QuantizedManifest
from quantkit.results.quality import Quality
from quantkit.results.verdict import Verdict

_SAME = 0.05  # relative; medians of a few runs differ by as much on a quiet machine


@dataclass(frozen=True)
class Item:
    """One item of the checklist.

    statement: what the evidence shows, None without any; evidence: where it can be looked up;
    missing: why there is none; holds: False where the evidence speaks against the item.
    """

    topic: str
    statement: str | None
    evidence: str = ""
    missing: str = ""
    holds: bool = True


@dataclass(frozen=True)
class Card:
    """What was gained and given up with one artifact, and its launch checklist.

    against: a sentence about what its memory and rates are compared with; empty where they weren't
    measured.
    """

    name: str
    verdict: Verdict | None
    goal: str | None
    against: str
    gained: tuple[str, ...]
    given_up: tuple[str, ...]
    kept: tuple[str, ...]
    checklist: tuple[Item, ...]


def cards(comparison: Comparison) -> list[Card]:
    """A card for each artifact, in the order of the comparison."""
    return [_card(comparison, index) for index in range(len(comparison.variants))]


def _card(comparison: Comparison, index: int) -> Card:
    variant = comparison.variants[index]
    trade = _Trade()
    base = comparison.baseline
    trade.less("on disk", variant.disk_bytes, base.disk_bytes, _megabytes)
    against = same_engine(comparison, variant)
    if variant.cost and against.cost:
        _weigh_costs(trade, variant.cost, against)
    if variant.quality:
        floor = comparison.references[0].quality if comparison.references else None
        _weigh_quality(trade, variant.quality, floor)
    return Card(
        name=variant.name,
        verdict=variant.verdict,
        goal=comparison.goal,
        against=_against(variant, against),
        gained=tuple(trade.gained),
        given_up=tuple(trade.given_up),
        kept=tuple(trade.kept),
        checklist=_checklist(comparison, variant, f"comparison.json: variants[{index}]"),
    )


def same_engine(comparison: Comparison, variant: Variant) -> Variant:
    """The unquantized model that ran in the variant's engine; the baseline where there is none."""
    for row in (comparison.baseline, *comparison.references):
        if row.cost and variant.cost and row.cost.engine == variant.cost.engine:
            return row
    return comparison.baseline


def _against(variant: Variant, row: Variant) -> str:
    if variant.cost is None or row.cost is None:
        return ""
    text = f"Memory and rates are those of {variant.cost.engine}, compared with {row.name}"
    if row.cost.engine != variant.cost.engine:
        text += f" in {row.cost.engine}: the difference isn't the quantization's alone"
    return f"{text}."


class _Trade:
    """What was gained, given up and kept, filled figure by figure."""

    def __init__(self) -> None:
        self.gained: list[str] = []
        self.given_up: list[str] = []
        self.kept: list[str] = []

    def less(self, what: str, mine: float | None, theirs: float | None, text: Any) -> None:
        """Add a figure of which less is better."""
        if mine and theirs:
            both = f"{text(mine)} instead of {text(theirs)}"
            self._add(theirs / mine, f"× less {what}: {both}", f"× more {what}: {both}", what)

    def more(self, what: str, mine: float | None, theirs: float | None, text: Any) -> None:
        """Add a figure of which more is better."""
        if mine and theirs:
            both = f"{text(mine)} instead of {text(theirs)}"
            self._add(mine / theirs, f"× the {what}: {both}", f"× slower {what}: {both}", what)

    def _add(self, ratio: float, better: str, worse: str, what: str) -> None:
        if ratio > 1 + _SAME:
            self.gained.append(f"{ratio:.2g}{better}")
        elif ratio < 1 - _SAME:
            self.given_up.append(f"{1 / ratio:.2g}{worse}")
        else:
            self.kept.append(f"{what}: within {_SAME:.0%}")


def _weigh_costs(trade: _Trade, mine: Cost, against: Variant) -> None:
    theirs = against.cost
    assert theirs is not None
    trade.less("memory for weights", mine.weights_bytes, theirs.weights_bytes, _megabytes)
    trade.less("memory at peak", mine.peak_bytes, theirs.peak_bytes, _megabytes)
    for what, figure in (
        ("prefill", "prefill_tokens_per_second"),
        ("decoding", "decode_tokens_per_second"),
        ("decoding at batch 8", "decode_tokens_per_second_batch8"),
    ):
        pair = getattr(mine, figure), getattr(theirs, figure)
        trade.more(what, *pair, lambda rate: f"{rate:,.0f} tokens/s")


def _weigh_quality(trade: _Trade, quality: Quality, floor: Quality | None) -> None:
    ratio, span = quality.perplexity.ratio, quality.intervals.get("perplexity.ratio")
    if ratio is not None:
        text = f"perplexity {ratio - 1:+.2%}"
        text += f" ({span.low - 1:+.2%} to {span.high - 1:+.2%})" if span else ""
        if span is not None and span.low <= 1 <= span.high:
            trade.kept.append(f"{text}: may be chance")
        elif ratio > 1:
            trade.given_up.append(text)
        else:
            trade.kept.append(f"{text}: not worse")
    if kl := quality.kl_divergence:
        noise = floor.kl_divergence if floor else None
        text = f"mean KL divergence {kl.mean:.2g} nats a token"
        text += f" ({noise.mean:.2g} is rounding alone)" if noise else ""
        own, known = quality.kl_interval, floor.kl_interval if floor else None
        is_noise = own is not None and known is not None and own.high <= known.high
        (trade.kept if is_noise else trade.given_up).append(text)
    if quality.top1_agreement is not None and quality.top1_agreement < 1:
        trade.given_up.append(f"another first choice at {1 - quality.top1_agreement:.2%} of tokens")
    if (changed := quality.experts_changed) and changed.mean:
        trade.given_up.append(f"other experts for {changed.mean:.2%} of tokens in a layer")
    if cases := quality.regression:
        passing = sum(case.baseline_passed for case in cases.cases)
        if cases.broken:
            trade.given_up.append(
                f"{cases.broken} of the {passing} cases that the baseline passes "
                f"({cases.broken_critical} of them critical)"
            )
        else:
            trade.kept.append(f"all {passing} cases that the baseline passes")
        if cases.fixed:
            trade.gained.append(f"{_counted(cases.fixed, 'case')} that the baseline fails")
    for task in quality.harness.tasks if quality.harness else ():
        if task.broken:
            text = f"{task.task}: {_counted(task.broken, 'sample')} that the baseline gets right"
            trade.given_up.append(text)
        if task.fixed:
            text = f"{task.task}: {_counted(task.fixed, 'sample')} that the baseline gets wrong"
            trade.gained.append(text)


def _checklist(comparison: Comparison, variant: Variant, place: str) -> tuple[Item, ...]:
    return (
        Item("Goal", comparison.goal, "given with --goal", "no goal was given: --goal"),
        _engine(variant, place),
        _calibration(variant),
        _evaluation(comparison, variant, place),
        Item("Way back", comparison.way_back, _baseline_evidence(comparison, variant)),
    )


def _engine(variant: Variant, place: str) -> Item:
    topic, cost = "Engine support", variant.cost
    if cost is None:
        return Item(topic, None, missing="not run in any engine: compare without --no-bench")
    if reason := cost.missing.get("all figures"):
        return Item(topic, f"does not run in {cost.engine}: {reason}", f"{place}.cost", holds=False)
    text = f"loaded and ran in {cost.engine} on {cost.device}; other engines weren't tried"
    return Item(topic, text, f"{place}.cost")


def _calibration(variant: Variant) -> Item:
    topic, manifest = "Calibration", variant.manifest
    if manifest is None:
        return Item(topic, None, missing=f"no {MANIFEST}: not made by quantkit")
    evidence = f"{variant.path}/{MANIFEST}: calibration"
    text = manifest.calibration if isinstance(manifest, QuantizedManifest) else None
    if text is None:
        statement = f"none: the recipe chooses codes by the weights alone ({manifest.method})"
        return Item(topic, statement, f"{variant.path}/{MANIFEST}: recipe")
    short = text.rows < text.rows_wanted
    statement = f"{text.rows} rows of {text.sequence_length} tokens{_beginning(text)}"
    statement += f" ({text.rows_wanted} were asked for)" if short else ""
    statement += f", text sha256 {text.dataset_sha256[:12]}…"
    return Item(topic, statement, evidence, holds=not short)


def _beginning(rows: CalibrationRecord | Quality) -> str:
    """What rows of tokens begin with, where that is known to be something."""
    return f", each begun with {' '.join(rows.beginning)}" if rows.beginning else ""


def _evaluation(comparison: Comparison, variant: Variant, place: str) -> Item:
    topic, quality = "Evaluation", variant.quality
    if quality is None or comparison.suite is None:
        return Item(topic, None, missing="not judged by a suite")
    text = f"suite {comparison.suite}: {quality.rows} rows of {quality.sequence_length} tokens"
    text += _beginning(quality)
    if quality.regression:
        text += f", {quality.regression.total} cases"
    if quality.harness:
        text += f", {_counted(len(quality.harness.tasks), 'harness task')}"
    if not variant.gates:
        return Item(topic, f"{text}; the suite has no gates", f"{place}.quality", holds=False)
    passed = sum(gate.passed for gate in variant.gates)
    text += f"; {passed} of {len(variant.gates)} gates passed: {variant.verdict}"
    return Item(topic, text, f"{place}.gates", holds=variant.verdict == Verdict.PASS)


def _baseline_evidence(comparison: Comparison, variant: Variant) -> str:
    if variant.manifest is not None:
        return f"digests of the baseline: {variant.path}/{MANIFEST}: source.files"
    return f"{comparison.baseline.path}"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"
