"""What an artifact gains and gives up."""

from __future__ import annotations

from dataclasses import replace

from quantkit.reports.tradeoff import cards
from tests.helpers.present import present
from tests.helpers.sample_comparison import sample


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
