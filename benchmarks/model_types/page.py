"""docs/models.md, of what every model type got."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from benchmarks.model_types.record import RECIPES, Row

_HEAD = """# Models

What each causal and each image-text model type of transformers {version} gets, tried on a tiny
random checkpoint (hidden size 256, three layers, BF16) by `make test-models`. A cell has the share
of the decoder layers' weights that was quantized; every artifact held all tensors of its source.
The difference is the largest of our streamed logits from those of transformers, over the largest
logit, both in float32.

{built} of {all} types could be built so small. {done} of them go through all five recipes, and
{mixtures} mixtures of experts through the four whose formats hold experts; {some} go through some,
{none} through none. Of the {texts} text types these are {texts_done}, {texts_mixtures},
{texts_some} and {texts_none}. {crashed}
"""


def page(rows: Sequence[Row]) -> str:
    """The page as Markdown."""
    import transformers

    built = [row for row in rows if not row.built]
    texts = [row for row in built if row.kind == "lm"]
    crashed = [f"`{row.model_type}` ({', '.join(row.crashed)})" for row in built if row.crashed]
    lines = [
        _HEAD.format(
            version=transformers.__version__,
            built=len(built),
            all=len(rows),
            **_counts(built),
            texts=len(texts),
            **{f"texts_{name}": count for name, count in _counts(texts).items()},
            crashed=f"Crashed: {', '.join(crashed)}." if crashed else "None crashed.",
        )
    ]
    for kind, title in (("lm", "Text"), ("vlm", "Images and text")):
        of_kind = [row for row in built if row.kind == kind]
        lines += [f"## {title}", "", _table(of_kind), ""]
    lines += ["## Refused", "", *_refusals(built), ""]
    lines += ["## Not built", "", *_missing(rows), ""]
    return "\n".join(lines)


def _done(row: Row) -> int:
    return sum(row.outcomes.get(name) == "done" for name in RECIPES)


def _counts(rows: Sequence[Row]) -> dict[str, int]:
    """How many types got how much."""
    counts = Counter(_outcome(row) for row in rows)
    return {name: counts[name] for name in ("done", "mixtures", "some", "none")}


def _outcome(row: Row) -> str:
    done = [name for name in RECIPES if row.outcomes.get(name) == "done"]
    if len(done) == len(RECIPES):
        return "done"
    if row.experts and done == [name for name in RECIPES if name != "nf4"]:
        return "mixtures"
    return "some" if done else "none"


def _table(rows: Sequence[Row]) -> str:
    names = list(RECIPES)
    lines = [
        f"| model type | {' | '.join(names)} | difference |",
        f"|---|{'---|' * (len(names) + 1)}",
    ]
    for row in rows:
        if not _done(row):
            continue
        cells = [
            f"{100 * row.share[name]:.0f}%" if row.outcomes.get(name) == "done" else "–"
            for name in names
        ]
        difference = "" if row.difference is None else f"{row.difference:.0e}"
        experts = " (experts)" if row.experts else ""
        lines.append(f"| {row.model_type}{experts} | {' | '.join(cells)} | {difference} |")
    return "\n".join(lines)


def _refusals(rows: Sequence[Row]) -> list[str]:
    """Reasons, with the types that were given them for the same recipes."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        by_reason: dict[str, list[str]] = {}
        for name in RECIPES:
            outcome = row.outcomes.get(name, "")
            if outcome != "done":
                by_reason.setdefault(_plain(outcome, row), []).append(name)
        for reason, names in by_reason.items():
            which = "" if len(names) == len(RECIPES) else f" ({', '.join(names)})"
            reasons.setdefault(f"{reason}{which}", []).append(row.model_type)
    counts = Counter({reason: len(types) for reason, types in reasons.items()})
    return [f"- {reason}: {', '.join(reasons[reason])}" for reason, _ in counts.most_common()]


def _plain(reason: str, row: Row) -> str:
    """A reason without the place of the checkpoint, and with the class's name left out."""
    for word in reason.split():
        if "/model" in word and word.startswith("/"):
            reason = reason.replace(f"{word} ", "").replace(word, "")
    return reason.replace(row.class_name, "the model").strip()


def _missing(rows: Sequence[Row]) -> list[str]:
    return [f"- {row.kind}:{row.model_type}: {row.built[:160]}" for row in rows if row.built]
