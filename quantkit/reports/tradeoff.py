"""The trade-off card and the launch checklist of each artifact, filled from evidence alone.

What was gained, what was given up and what stayed the same is read off the comparison's figures.
The checklist names where the evidence of each item lies; an item without any is empty, and says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantkit.results.comparison import Comparison, Variant
from quantkit.results.cost import Cost
from quantkit.results.manifest import MANIFEST
from quantkit.results.quality import Quality
from quantkit.results.verdict import Verdict

_SAME = 0.05  # medians of a few runs differ by this much on a quiet machine


@dataclass(frozen=True)
class Item:
    """One item of the checklist. said: None where there is no evidence; ``missing`` says what
    would give some. ``holds``: False where the evidence speaks against it."""

    topic: str
    said: str | None
    evidence: str = ""
    missing: str = ""
    holds: bool = True


@dataclass(frozen=True)
class Card:
    """What an artifact costs and brings against the baseline, and what is known before launch.

    against: what its memory and rates were held against; empty where they weren't measured.
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
    """One card an artifact, in the order of the table."""
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
        variant.name,
        variant.verdict,
        comparison.goal,
        _against(variant, against),
        tuple(trade.gained),
        tuple(trade.given_up),
        tuple(trade.kept),
        _checklist(comparison, variant, f"comparison.json: variants[{index}]"),
    )


def same_engine(comparison: Comparison, variant: Variant) -> Variant:
    """The unquantized row in the variant's engine; the baseline where there is none."""
    for row in (comparison.baseline, *comparison.references):
        if row.cost and variant.cost and row.cost.engine == variant.cost.engine:
            return row
    return comparison.baseline


def _against(variant: Variant, row: Variant) -> str:
    if variant.cost is None or row.cost is None:
        return ""
    said = f"Memory and rates are those of {variant.cost.engine}, against {row.name}"
    if row.cost.engine != variant.cost.engine:
        said += f" in {row.cost.engine}: they aren't the quantization's alone"
    return f"{said}."


class _Trade:
    """Three lists, filled figure by figure."""

    def __init__(self) -> None:
        self.gained: list[str] = []
        self.given_up: list[str] = []
        self.kept: list[str] = []

    def less(self, what: str, mine: float | None, theirs: float | None, text: Any) -> None:
        """A figure that is better small."""
        if mine and theirs:
            said = f"{text(mine)} instead of {text(theirs)}"
            self._place(theirs / mine, f"× less {what}: {said}", f"× more {what}: {said}", what)

    def more(self, what: str, mine: float | None, theirs: float | None, text: Any) -> None:
        """A figure that is better large."""
        if mine and theirs:
            said = f"{text(mine)} instead of {text(theirs)}"
            self._place(mine / theirs, f"× the {what}: {said}", f"× slower {what}: {said}", what)

    def _place(self, ratio: float, better: str, worse: str, what: str) -> None:
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
        said = f"perplexity {ratio - 1:+.2%}"
        said += f" ({span.low - 1:+.2%} to {span.high - 1:+.2%})" if span else ""
        if span is not None and span.low <= 1 <= span.high:
            trade.kept.append(f"{said}: may be chance")
        elif ratio > 1:
            trade.given_up.append(said)
        else:
            trade.kept.append(f"{said}: not worse")
    if kl := quality.kl_divergence:
        known = floor.kl_divergence if floor else None
        said = f"mean KL divergence {kl.mean:.2g} nats a token"
        said += f" ({known.mean:.2g} is rounding alone)" if known else ""
        (trade.kept if known and kl.high <= known.high else trade.given_up).append(said)
    if quality.top1_agreement is not None and quality.top1_agreement < 1:
        trade.given_up.append(f"another first choice at {1 - quality.top1_agreement:.2%} of tokens")
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
            said = f"{task.task}: {_counted(task.broken, 'sample')} that the baseline gets right"
            trade.given_up.append(said)
        if task.fixed:
            said = f"{task.task}: {_counted(task.fixed, 'sample')} that the baseline gets wrong"
            trade.gained.append(said)


def _checklist(comparison: Comparison, variant: Variant, place: str) -> tuple[Item, ...]:
    return (
        Item("Goal", comparison.goal, "said when comparing (--goal)", "no goal was given: --goal"),
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
    said = f"loaded and ran in {cost.engine} on {cost.device}; other engines weren't tried"
    return Item(topic, said, f"{place}.cost")


def _calibration(variant: Variant) -> Item:
    topic, manifest = "Calibration", variant.manifest
    if manifest is None:
        return Item(topic, None, missing=f"no {MANIFEST}: not made by quantkit")
    evidence = f"{variant.path}/{MANIFEST}: calibration"
    found = manifest.get("calibration")
    if not found:
        said = f"none: the recipe chooses codes by the weights alone ({manifest.get('method')})"
        return Item(topic, said, f"{variant.path}/{MANIFEST}: recipe")
    short = found["rows"] < found["rows_wanted"]
    said = f"{found['rows']} rows of {found['sequence_length']} tokens"
    said += f" ({found['rows_wanted']} were asked for)" if short else ""
    said += f", text sha256 {found['dataset_sha256'][:12]}…"
    return Item(topic, said, evidence, holds=not short)


def _evaluation(comparison: Comparison, variant: Variant, place: str) -> Item:
    topic, quality = "Evaluation", variant.quality
    if quality is None or comparison.suite is None:
        return Item(topic, None, missing="not judged by a suite")
    said = f"suite {comparison.suite}: {quality.rows} rows of {quality.sequence_length} tokens"
    if quality.regression:
        said += f", {quality.regression.total} cases"
    if quality.harness:
        said += f", {_counted(len(quality.harness.tasks), 'harness task')}"
    if not variant.gates:
        return Item(topic, f"{said}; the suite has no gates", f"{place}.quality", holds=False)
    passed = sum(gate.passed for gate in variant.gates)
    said += f"; {passed} of {len(variant.gates)} gates passed: {variant.verdict}"
    return Item(topic, said, f"{place}.gates", holds=variant.verdict == Verdict.PASS)


def _baseline_evidence(comparison: Comparison, variant: Variant) -> str:
    if variant.manifest and variant.manifest.get("source"):
        return f"digests of the baseline: {variant.path}/{MANIFEST}: source.files"
    return f"{comparison.baseline.path}"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"
