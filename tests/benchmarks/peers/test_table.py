"""Medians, ranges, ratios and remarks of the table."""

from __future__ import annotations

from typing import Any

from benchmarks.peers.table import COLUMNS, Figures, ratios, render, table
from tests.helpers.peer_runs import run_of

BITSANDBYTES = "transformers + bitsandbytes"
SETTING: dict[str, Any] = {
    "date": "2026-11-20T10:00+00:00",
    "machine": {
        "processor": "a processor",
        "cores": 2,
        "memory_bytes": 2**34,
        "system": "Linux",
        "python": "3.12",
        "load": 0.1,
        "device": "cpu",
        "variables": {"OMP_NUM_THREADS": "2"},
    },
    "versions": {"quantkit": "abc", "gptqmodel": "gptqmodel 7.7.0"},
}


def test_figures_are_medians_but_the_peak_is_the_worst() -> None:
    runs = [
        run_of("t", number=n, wall=wall, cpu=cpu, peak=peak)
        for n, (wall, cpu, peak) in enumerate([(9.0, 20.0, 5), (3.0, 30.0, 9), (4.0, 10.0, 7)])
    ]
    expected = Figures(wall=4.0, low=3.0, high=9.0, cpu=20.0, peak=9, weights=4_000_000, error=None)
    assert Figures.of(runs) == expected


def test_one_failed_run_is_a_failed_tool() -> None:
    runs = [run_of("t"), run_of("t", number=1, error="ValueError: no"), run_of("t", number=2)]
    assert Figures.of(runs).error == "ValueError: no"


def test_a_row_has_every_figure_and_our_share_of_it() -> None:
    runs = [
        run_of("quantkit", wall=5.0, cpu=6.0, peak=500_000_000),
        run_of(BITSANDBYTES, wall=10.0, cpu=24.0, peak=2_000_000_000, weights=4_500_000),
    ]
    assert table("nf4", runs) == [
        *COLUMNS,
        "| quantkit | 1 | 5.0 | 6.0 | 0.50 | 4.0 | 4.00 |  |  |  |",
        f"| {BITSANDBYTES} | 1 | 10.0 | 24.0 | 2.00 | 4.5 | 4.50 | 0.50 | 0.25 | 0.25 |",
    ]


def test_several_runs_show_the_range_of_wall_times() -> None:
    runs = [run_of("quantkit", number=n, wall=wall) for n, wall in enumerate((4.0, 2.0, 9.0))]
    assert table("nf4", runs)[-1].startswith("| quantkit | 3 | 4.0 (2.0–9.0) | 15.0 |")


def test_a_failure_keeps_the_table_whole() -> None:
    row = table("nf4", [run_of(BITSANDBYTES, error="a | b")])[-1]
    assert row.startswith(f"| {BITSANDBYTES} | 1 | a / b |")
    assert row.count("|") == COLUMNS[0].count("|")


def test_ratios_are_of_each_of_our_tools() -> None:
    own = [Figures.of([run_of("quantkit", wall=wall)]) for wall in (5.0, 20.0)]
    own.append(Figures.of([run_of("quantkit", error="no")]))
    theirs = Figures.of([run_of("t", wall=10.0)])
    assert ratios(own, theirs, "wall") == "0.50 / 2.00 / –"


def test_tools_without_runs_have_no_row_and_no_remark() -> None:
    names = ["quantkit, propagate: original", "quantkit, propagate: corrected", "GPTQModel"]
    lines = table("gptq", [run_of(name, job="gptq") for name in names])
    rows = [line for line in lines if line.startswith("| ")][1:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == names
    assert "Ratios: of quantkit, propagate: original / quantkit, propagate: corrected." in lines
    remarks = [line for line in lines if line.startswith("* ")]
    assert len(remarks) == 1 and remarks[0].startswith("* GPTQModel: with fewer")


def test_the_page_has_the_setting_and_a_section_for_each_model_and_job() -> None:
    runs = [
        run_of("quantkit"),
        run_of("quantkit", job="merge"),
        run_of("quantkit", model="82m", parameters=82_000_000),
    ]
    page = render(SETTING, runs)
    assert "a processor, 2 cores, 16 GiB · Linux · Python 3.12" in page
    assert "· OMP_NUM_THREADS=2" in page and "| gptqmodel | gptqmodel 7.7.0 |" in page
    headings = [line for line in page.splitlines() if line.startswith("##")]
    assert headings == [
        "## tiny (8.0 million parameters), cpu",
        "### NF4 with double quantization",
        "### Merging a LoRA adapter of rank 64, BF16",
        "## 82m (82.0 million parameters), cpu",
        "### NF4 with double quantization",
    ]
