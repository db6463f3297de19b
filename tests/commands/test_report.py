"""quantkit report, and the reports that compare leaves."""

from __future__ import annotations

import csv
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantkit.base.resources import suites
from quantkit.cli import app
from quantkit.reports.files import (
    read_comparison,
    render_report,
    write_reports,
)
from quantkit.reports.html.page import comparison_html
from tests.helpers.page import Page
from tests.helpers.sample_comparison import sample


@pytest.fixture(scope="module")
def source() -> str:
    return comparison_html(sample())


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def test_the_report_command_makes_each_form_and_overwrites_nothing(tmp_path: Path) -> None:
    write_reports(sample(), tmp_path)
    run = CliRunner().invoke
    for name in ("page.html", "table.csv", "tests.xml", "summary.md"):
        command = ["report", str(tmp_path / "comparison.json"), "--out", str(tmp_path / name)]
        assert run(app, command).exit_code == 0
        assert (tmp_path / name).read_text() == render_report(sample(), tmp_path / name)
        again = run(app, command)
        assert again.exit_code == 2 and "--force" in again.output
        assert run(app, [*command, "--force"]).exit_code == 0
    unknown = run(app, ["report", str(tmp_path / "comparison.json"), "-o", str(tmp_path / "a.doc")])
    assert unknown.exit_code == 2 and ".md, .html, .csv, .xml" in unknown.output
    missing = run(app, ["report", str(tmp_path / "no.json"), "-o", str(tmp_path / "b.html")])
    assert missing.exit_code == 2 and "no such file" in missing.output
    assert not (tmp_path / "a.doc").exists() and not (tmp_path / "b.html").exists()


SUITE = """
schema: 1
name: few
version: 1.0.0
likelihood: {dataset: heldout.jsonl, sequence_length: 64, rows: 4}
regression: {cases: cases.jsonl}
gates:
  - {metric: kl_divergence.mean, max: 0.0001}
"""


def test_compare_leaves_a_report_of_what_it_saw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "step.md"))
    for name, count in (("heldout", 60), ("regression", 6)):
        lines = (suites() / f"demo-{name}.jsonl").read_text().splitlines()[:count]
        target = {"heldout": "heldout.jsonl", "regression": "cases.jsonl"}[name]
        (tmp_path / target).write_text("\n".join(lines))
    (tmp_path / "suite.yaml").write_text(SUITE)
    made, out = tmp_path / "rtn", tmp_path / "out"
    run = CliRunner().invoke
    settings = ["--set", "quantize.bits=2", "--set", "quantize.format=gptq"]
    quantized = run(app, ["quantize", "rtn-w4-g128", "-m", "demo", "-o", str(made), *settings])
    assert quantized.exit_code == 0, quantized.output
    command = ["compare", str(made), "--baseline", "demo", "--suite", str(tmp_path / "suite.yaml")]
    done = run(app, [*command, "--out", str(out), "--no-bench", "--goal", "to be seen"])
    assert done.exit_code == 1, done.output  # 2 bits fail the gate

    comparison = read_comparison(out / "comparison.json")
    assert comparison.goal == "to be seen" and len(comparison.cases) == 6
    manifest = json.loads((made / "quantkit.json").read_text())
    page = Page((out / "report.html").read_text())
    assert manifest["recipe"]["digest"] in page.text
    assert manifest["source"]["files"]["model.safetensors"] in page.text
    for heading in ("Quality against size", "Error by layer", "Regression cases by tag"):
        assert heading in page.text
    assert "Memory and throughput" not in page.text
    tests = ET.parse(out / "junit.xml").getroot().findall("*/testcase")
    assert len(tests) == 1 + 6
    assert len(list(csv.DictReader((out / "comparison.csv").open()))) == 3
    assert (tmp_path / "step.md").read_text() == (out / "comparison.md").read_text() + "\n"
