"""The comparison as CSV: a row for each model. The names of columns are never changed."""

from __future__ import annotations

import csv
import io
from dataclasses import fields
from typing import Any

from quantkit.results.comparison import Comparison, Variant
from quantkit.results.cost import Cost
from quantkit.results.metrics import EXPERT_METRICS, METRICS

_VARIANT = (
    "name",
    "path",
    "recipe",
    "method",
    "format",
    "bits_per_weight",
    "disk_bytes",
    "verdict",
)
_BESIDE = ("perplexity.stderr", "kl_divergence.low", "regression.total", "rows", "sequence_length")
_COST = tuple(field.name for field in fields(Cost) if field.name != "missing")
_METRICS = tuple(name for name in METRICS if name not in EXPERT_METRICS)
COLUMNS = ("role", *_VARIANT, *_METRICS, *_BESIDE, *(f"cost.{name}" for name in _COST))


def comparison_csv(comparison: Comparison) -> str:
    """The baseline, the references and the artifacts, with all figures in full precision.

    What wasn't measured is empty. Mixtures of experts have columns of their own at the end.
    """
    text = io.StringIO()
    mixtures = any(model.quality and model.quality.experts_changed for model in comparison.models)
    columns = COLUMNS + EXPERT_METRICS * mixtures
    table = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    table.writeheader()
    roles = ("baseline",) + ("reference",) * len(comparison.references)
    roles += ("artifact",) * len(comparison.variants)
    for role, model in zip(roles, comparison.models, strict=True):
        table.writerow({"role": role, **_row(model)})
    return text.getvalue()


def _row(model: Variant) -> dict[str, Any]:
    row = {name: getattr(model, name) for name in _VARIANT}
    for name in (*METRICS, *_BESIDE):
        row[name] = model.quality.metric(name) if model.quality else None
    for name in _COST:
        row[f"cost.{name}"] = getattr(model.cost, name, None)
    return row
