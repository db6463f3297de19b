"""The comparison as a page, CSV, JUnit and Markdown, and as JSON that all of them come from."""

from __future__ import annotations

import csv
import io
import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from quantkit.base.errors import InputError
from quantkit.base.resources import suites
from quantkit.cli import app
from quantkit.reports.files import (
    append_step_summary,
    read_comparison,
    render_report,
    write_reports,
)
from quantkit.reports.html.page import comparison_html
from quantkit.reports.junit import comparison_junit
from quantkit.reports.markdown import comparison_markdown
from quantkit.reports.table_csv import COLUMNS, comparison_csv
from quantkit.reports.tradeoff import cards
from quantkit.results.verdict import Verdict
from tests.helpers.present import present
from tests.helpers.sample_comparison import HOSTILE, sample

ROOT = Path(__file__).parents[2]
VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """Elements with their attributes, all text, and whether every element is closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.crossed: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if self.open.pop() != tag:
            self.crossed.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def source() -> str:
    return comparison_html(sample())


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def test_the_page_is_well_formed(page: Page, source: str) -> None:
    assert not page.open and not page.crossed
    pictures = re.findall(r"<svg.*?</svg>", source, re.DOTALL)
    assert len(pictures) == 2 + 5 + 3 + 3  # quality, cost, layers, slices
    for picture in pictures:
        ET.fromstring(picture)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    links = [present(a["href"]).removeprefix("#") for tag, a in page.elements if tag == "a"]
    assert len(set(ids)) == len(ids) and set(links) <= set(ids)


def test_the_page_points_nowhere_else(page: Page, source: str) -> None:
    for tag, attributes in page.elements:
        assert tag not in {"script", "img", "iframe", "object"}
        assert not {"src", "srcset", "action", "onerror", "onclick"} & attributes.keys()
        assert (attributes.get("href") or "#").startswith(("#", "data:,"))
    style = source.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style


def test_answers_are_text_whatever_they_hold(page: Page) -> None:
    assert "<script>alert('x')</script><img src=//e.example/x" in page.text
    assert "\x00" not in page.text and "\x1b" not in page.text


def test_the_page_says_what_it_is_for(page: Page) -> None:
    comparison = sample()
    for model in comparison.models:
        assert model.name in page.text
    for said in (
        "Goal: Answers in 8 GB of memory",
        "Of 3 artifacts, judged against BF16: 2 passed every gate, 1 failed at least one.",
        "kl_divergence.mean is 0.05, allowed at most 0.02",
        "user: What is 2 + 2?",
        "number: 4.0",
        "rtn-w4, fails: number: holds no number",
        "2 of the 19 cases that the baseline passes (1 of them critical)",
        "loaded and ran in quantkit-int4 on cpu",
        "serve the baseline again: model",
        "ab" * 32,
        "No patch: every place has 8 bits already.",
    ):
        assert said in page.text, said


def test_what_is_not_known_is_said_to_be_empty() -> None:
    row = replace(sample().variants[0], manifest=None, cost=None, run=None)
    comparison = replace(sample(goal=None), variants=(row,), references=(), cases=(), occasion=None)
    checklist = {item.topic: item for item in cards(comparison)[0].checklist}
    assert [topic for topic, item in checklist.items() if item.statement is None] == [
        *("Goal", "Engine support", "Calibration")
    ]
    text = Page(comparison_html(comparison)).text
    assert "Empty: no goal was given" in text and "Empty: no quantkit.json" in text
    assert "- [ ] **Engine support:** empty: not run" in comparison_markdown(comparison)


def test_a_row_of_which_nothing_was_measured_has_a_page_too() -> None:
    row = replace(sample().variants[0], quality=None, cost=None, gates=(), verdict=None)
    comparison = replace(sample(), variants=(row,), verdict=None, suite=None)
    assert "No verdict" in Page(comparison_html(comparison)).text
    assert ET.fromstring(comparison_junit(comparison)).get("tests") == "0"


def test_an_engine_that_did_not_run_is_no_support() -> None:
    row = sample().variants[0]
    cost = replace(present(row.cost), missing={"all figures": "no kernel"})
    comparison = replace(sample(), variants=(replace(row, cost=cost),))
    item = cards(comparison)[0].checklist[1]
    assert not item.holds and item.statement == "does not run in quantkit-int4: no kernel"


def test_what_got_worse_is_given_up_and_noise_is_kept() -> None:
    card = cards(sample())[2]
    assert any("less on disk" in text for text in card.gained)
    assert any("perplexity +5.00%" in text for text in card.given_up)
    assert any("2 of the 19 cases" in text for text in card.given_up)
    assert "sums: 1 sample that the baseline gets right" in card.given_up
    assert any("within 5%" in text for text in card.kept)
    assert "quantkit-int4, compared with BF16 in transformers" in card.against


def test_junit_has_every_gate_and_every_case() -> None:
    root = ET.fromstring(comparison_junit(sample()))
    names = [suite.get("name") for suite in root]
    assert names == ["awq-w4", "gptq-w4", "rtn-w4"]
    for suite in root:
        assert {test.get("classname") for test in suite} == {suite.get("name")}
        assert suite.get("tests") == str(2 + 20) == str(len(suite))
        assert suite.get("skipped") == "1"  # the one that the baseline fails
    failed = [test.get("name") for test in root[2] if test.find("failure") is not None]
    assert present(root[2].find("testcase[@name='case c0']/failure")).get("message") == (
        "critical case broken: number: holds no number"
    )
    assert failed == ["gate kl_divergence.mean <= 0.02", "case c0", "case c1"]
    assert (root.get("failures"), root.get("errors")) == ("3", "0")
    message = present(root[2].find("testcase/failure")).get("message")
    assert message == "kl_divergence.mean is 0.05, allowed at most 0.02"


def test_an_inconclusive_gate_is_an_error_to_junit() -> None:
    row = sample().variants[0]
    gates = tuple(replace(gate, verdict=Verdict.INCONCLUSIVE) for gate in row.gates)
    root = ET.fromstring(comparison_junit(replace(sample(), variants=(replace(row, gates=gates),))))
    assert (root.get("failures"), root.get("errors")) == ("0", "2")


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
