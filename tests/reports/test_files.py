"""Reports written to files and read again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from quantkit.base.errors import InputError
from quantkit.cli import app
from quantkit.reports.files import (
    append_step_summary,
    read_comparison,
    write_reports,
)
from tests.helpers.page import Page
from tests.helpers.sample_comparison import HOSTILE, sample

ROOT = Path(__file__).parents[2]


def test_a_comparison_can_be_read_again(tmp_path: Path) -> None:
    written = write_reports(sample(), tmp_path / "new")
    assert [path.name for path in written] == [
        *("comparison.json", "comparison.md", "report.html", "comparison.csv", "junit.xml")
    ]
    assert read_comparison(written[0]) == sample()


def test_a_comparison_of_before_the_renaming_can_be_read(tmp_path: Path) -> None:
    """As 0.1.0.dev wrote it, with ``localisation`` and a patch that ``mends``."""
    old = ROOT / "tests" / "data" / "comparison_0.1.0.dev.json"
    assert '"localisation": {' in old.read_text() and '"mends": true' in old.read_text()
    (row,) = read_comparison(old).variants
    assert row.localization is not None and row.localization.patch is not None
    assert row.localization.patch.fixes is True
    assert row.localization.places[0].modules == ("model.layers.0.mlp.down_proj",)
    out = tmp_path / "page.html"
    assert CliRunner().invoke(app, ["report", str(old), "--out", str(out)]).exit_code == 0
    text = Page(out.read_text()).text
    assert "Where it loses" in text and "rtn-w4-mended 1.1.0" in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 2}, "schema is 2, not 1"),
        ({"verdict": "MAYBE"}, "verdict is 'MAYBE': "),
        ({"variants": [{"name": "v"}]}, "variants.0.path is missing"),
    ],
)
def test_what_is_no_comparison_is_refused(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    path = tmp_path / "comparison.json"
    path.write_text(json.dumps(sample().to_json() | change))
    with pytest.raises(InputError, match=re.escape(said)) as failure:
        read_comparison(path)
    assert failure.value.where == str(path)


def test_the_summary_of_a_github_step_gets_the_markdown(tmp_path: Path) -> None:
    assert append_step_summary(sample(), {}) is None
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    assert append_step_summary(sample(), {"GITHUB_STEP_SUMMARY": str(summary)}) == summary
    text = summary.read_text()
    assert text.startswith("before\n# Comparison") and "| **Quality** |" in text
    assert HOSTILE not in text
    summary.write_text("x" * (1024 * 1024 - 1000))
    append_step_summary(sample(), {"GITHUB_STEP_SUMMARY": str(summary)})
    assert 1024 * 1024 - 500 < summary.stat().st_size <= 1024 * 1024
    assert summary.read_text().endswith("The rest is in comparison.md.\n")
