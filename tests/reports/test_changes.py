"""What differs between two answers, word by word."""

from __future__ import annotations

import pytest

from quantkit.reports.changes import changes


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("the cat sat on the mat", "the dog sat on a mat"),
        ("", "new"),
        ("gone", ""),
        ("same", "same"),
        ("tea", "the drink of Ada is coffee, not tea"),
        ("w " * 3000, "v " * 10),
    ],
)
def test_changes_lose_nothing_of_either_side(old: str, new: str) -> None:
    pieces = changes(old, new)
    assert "".join(p.text for p in pieces if p.change != "removed") == new
    assert "".join(p.text for p in pieces if p.change != "added") == old


def test_changes_mark_single_words() -> None:
    marked = [(p.text, p.change) for p in changes("it is red wine", "it is blue wine")]
    assert marked == [
        *(("it is ", "same"), ("red ", "removed"), ("blue ", "added"), ("wine", "same"))
    ]
