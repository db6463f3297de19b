"""A comparison as CSV."""

from __future__ import annotations

import csv
import io

from quantkit.reports.table_csv import COLUMNS, comparison_csv
from tests.helpers.present import present
from tests.helpers.sample_comparison import sample


def test_csv_keeps_full_precision_and_its_columns() -> None:
    comparison = sample()
    rows = list(csv.DictReader(io.StringIO(comparison_csv(comparison))))
    assert tuple(rows[0]) == COLUMNS
    assert [row["role"] for row in rows] == ["baseline", "reference", *["artifact"] * 3]
    assert [row["name"] for row in rows] == [model.name for model in comparison.models]
    quality = present(comparison.variants[0].quality)
    assert float(rows[2]["perplexity.ratio"]) == quality.perplexity.ratio
    assert float(rows[4]["regression.broken_critical"]) == 1
    assert rows[0]["kl_divergence.mean"] == "" and rows[1]["cost.engine"] == ""
    assert rows[2]["verdict"] == "PASS"
