"""The report in a real browser: it loads nothing, logs no error, and fits any screen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from quantkit.reports.files import write_reports
from tests.helpers import browser
from tests.helpers.sample_comparison import sample

pytestmark = pytest.mark.skipif(browser.PROGRAM is None, reason=browser.MISSING)

SPILLS = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
# Contrast of the text's color with the paper's, https://www.w3.org/TR/WCAG21/#dfn-contrast-ratio
CONTRAST = """(() => {
    const luminance = color => color.match(/[\\d.]+/g).slice(0, 3).map(Number)
        .map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const paper = luminance(getComputedStyle(document.body).backgroundColor);
    const marks = document.querySelectorAll("p, h2, td, th, li, a, .pass, .fail, .note, ins, del");
    return Math.min(...[...marks].map(mark => {
        const pair = [paper, luminance(getComputedStyle(mark).color)].sort((a, b) => b - a);
        return (pair[0] + 0.05) / (pair[1] + 0.05);
    }));
})()"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Tab]:
    with browser.tab(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_reports(sample(), folder)
    return folder / "report.html"


def test_it_asks_for_nothing_and_says_nothing(tab: browser.Tab, page: Path) -> None:
    tab.visit(page)
    assert not tab.requested() and not tab.complaints()
    assert "rtn-w4" in tab.evaluate("document.body.innerText")
    assert tab.evaluate("document.querySelectorAll('svg').length") == 13


def test_the_browser_would_have_told(tab: browser.Tab, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<img src=http://127.0.0.1:9/x.png><script>console.error('no')</script>")
    tab.visit(page)
    assert tab.requested() == ["http://127.0.0.1:9/x.png"]
    assert any("no" in str(complaint) for complaint in tab.complaints())


@pytest.mark.parametrize("width", [390, 768, 1400])
def test_it_fits_the_screen(tab: browser.Tab, page: Path, width: int) -> None:
    tab.call(
        "Emulation.setDeviceMetricsOverride",
        width=width,
        height=900,
        deviceScaleFactor=1,
        mobile=width < 500,
    )
    tab.visit(page)
    assert tab.evaluate("innerWidth") == width
    assert tab.evaluate(SPILLS) == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_in_light_and_dark(tab: browser.Tab, page: Path, scheme: str) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    tab.call("Emulation.setEmulatedMedia", features=[feature])
    tab.visit(page)
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(252, 252, 250)", "dark": "rgb(21, 24, 27)"}[scheme]
    assert tab.evaluate(CONTRAST) >= 4.5
