"""The page: well formed, alone in its file, and safe whatever answers hold."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from quantkit.reports.html.page import comparison_html
from quantkit.reports.junit import comparison_junit
from quantkit.reports.markdown import comparison_markdown
from quantkit.reports.tradeoff import cards
from tests.helpers.page import Page
from tests.helpers.present import present
from tests.helpers.sample_comparison import sample


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
