"""The tables of a comparison, and its JSON."""

from __future__ import annotations

import json
import re
from dataclasses import replace

from quantkit.judging.intervals import with_intervals
from quantkit.judging.variants import apply_gates
from quantkit.recipes.suite import Gate
from quantkit.reports.cells import notes, table
from quantkit.reports.details import details
from quantkit.reports.html.page import comparison_html
from quantkit.reports.markdown import comparison_markdown
from quantkit.reports.table_csv import comparison_csv
from quantkit.reports.tradeoff import cards
from quantkit.results.quality import ExpertsChanged
from quantkit.results.regression import CaseOutcome, RegressionResult
from tests.helpers.present import present
from tests.helpers.variants import SPREAD, comparison, over_rows, variant


def test_the_table_says_what_is_missing_broken_and_failed() -> None:
    said = "\n".join(notes(comparison()))
    assert "Missing: v, decode: no such kernel" in said
    assert "Broken: v, c0 (critical): 'before' became 'no|w'" in said
    assert "Failed: v, regression.broken is 1, allowed at most 0" in said
    assert "Differs: v: the weights only." in said and "Way back: serve it" in said
    grid = table(comparison().models)
    assert grid.headers == ("BF16", "v")
    labels = [row.label for section in grid.sections for row in section.rows]
    assert "decode ×1, tokens/s" not in labels  # measured for none of them


def test_markdown_is_made_of_well_formed_tables() -> None:
    text = comparison_markdown(comparison())
    tables = [part for part in text.split("\n\n") if part.startswith("|")]
    assert [part.count("\n") >= 2 for part in tables] == [True, True]  # figures, gates
    for part in tables:
        assert len({line.replace("\\|", "").count("|") for line in part.splitlines()}) == 1
    assert "no\\|w" in text


def test_details_show_intervals_slices_and_what_is_missing() -> None:
    cases = tuple(
        CaseOutcome(f"c{i}", i > 5, True, False, ("odd" if i % 2 else "even", "all"), "", "")
        for i in range(40)
    )
    given = with_intervals(replace(over_rows(SPREAD), regression=RegressionResult(cases)))
    gates = [
        Gate(metric="kl_divergence.mean", max=0.0102, confidence=0.95),
        Gate(metric="regression.tags.odd.pass_rate", min=0.5, confidence=0.95),
    ]
    row = apply_gates(variant(quality=given), gates)
    shown, slices = details(replace(comparison(), variants=(row,)))
    near, on_a_tag = shown.rows
    assert near[2] == "0.0100075" and near[3].endswith(" at 95%")
    assert near[4:6] == ("at most 0.0102", "INCONCLUSIVE")
    assert re.fullmatch(r"about [\d,]+ more rows", near[6])
    assert on_a_tag[2] == "0.85" and on_a_tag[4:] == ("at least 0.5", "PASS", "")
    assert [line[1] for line in slices.rows] == ["all cases", "even", "all", "odd"]
    everything, even = slices.rows[0], slices.rows[1]
    assert everything[2] == "34/40" and everything[4] == "-15.0%"
    assert everything[6:] == ("6 / 0", f"{2 / 2**6:.3f}")
    assert even[2] == "17/20" and even[6:] == ("3 / 0", "0.250")


def test_json_has_the_documented_fields() -> None:
    value = json.loads(json.dumps(comparison().to_json()))
    assert value["verdict"] == "FAIL" and value["baseline"]["name"] == "BF16"
    (row,) = value["variants"]
    for name in ("name", "recipe", "method", "format", "bits_per_weight", "disk_bytes", "verdict"):
        assert row[name] is not None
    assert {"value", "stderr", "ratio"} <= row["quality"]["perplexity"].keys()
    assert {"mean", "low", "high", "p99"} <= row["quality"]["kl_divergence"].keys()
    assert row["quality"]["top1_agreement"] == 0.97
    assert {"passed", "total", "broken", "fixed"} <= row["quality"]["regression"].keys()
    wanted = {
        "engine",
        "weights_bytes",
        "peak_bytes",
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
        "ttft_ms",
        "tpot_ms",
    }
    assert wanted <= row["cost"].keys()


def test_only_mixtures_of_experts_have_a_figure_of_them() -> None:
    dense = comparison()
    mixture = replace(
        dense,
        variants=tuple(
            replace(
                row,
                quality=replace(
                    present(row.quality),
                    experts_changed=ExpertsChanged(0.25, {"1": 0.0, "10": 0.5, "2": 0.25}),
                ),
            )
            for row in dense.variants
        ),
    )
    texts = [
        [write(given) for write in (comparison_markdown, comparison_html, comparison_csv)]
        for given in (dense, mixture)
    ]
    assert not any("expert" in text for text in texts[0])
    markdown, page, rows = texts[1]
    assert "| tokens with other experts ↓ | – | 25.00% |" in markdown
    [title] = [part for part in details(mixture) if "experts" in part.title]
    assert title.headers == ("layer", "v")
    assert title.rows == (("1", "0.00%"), ("2", "25.00%"), ("10", "50.00%"))
    assert "Tokens with other experts, by layer" in markdown and "block 10, v: 0.5" in page
    header, *lines = rows.splitlines()
    assert header.endswith(",experts_changed.mean,experts_changed.worst")
    assert lines[0].endswith(",,") and lines[1].endswith(",0.25,0.5")
    assert "other experts for 25.00% of tokens in a layer" in cards(mixture)[0].given_up
