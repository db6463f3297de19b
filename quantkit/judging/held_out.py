"""The held-out text of a suite, as the rows that both sides of a comparison see."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from quantkit.base.errors import InputError
from quantkit.calibration.text import check_length, pack
from quantkit.checkpoint.reader import Checkpoint
from quantkit.recipes.suite import LoadedSuite


def held_out_rows(loaded: LoadedSuite, checkpoint: Checkpoint, tokenizer: Any) -> Tensor:
    """Rows of tokens (rows, tokens) int64. Raises InputError for fewer than two."""
    likelihood = loaded.suite.likelihood
    check_length(likelihood.sequence_length, checkpoint.config, "likelihood")
    dataset = loaded.likelihood_dataset()
    rows = pack(
        dataset,
        tokenizer,
        sequence_length=likelihood.sequence_length,
        rows=likelihood.rows,
        seed=None,  # held-out text keeps its order
    )
    if rows.count < 2:
        raise InputError(
            "fills one row only; intervals need at least two",
            subject=str(dataset),
            fix="Give more text or a shorter sequence_length.",
        )
    return rows.ids
