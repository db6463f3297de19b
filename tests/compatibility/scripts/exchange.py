"""What an engine is asked, and what it answers. Standard library only: every engine's interpreter
runs this."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """path: what the engine loads. dtype: what it computes in.

    prompts: token ids, each continued greedily by ``new_tokens``, or up to one of ``end``.
    rows: token ids, all of one length.
    """

    path: str
    dtype: str
    prompts: list[list[int]]
    new_tokens: int
    end: list[int]
    rows: list[list[int]]


@dataclass(frozen=True)
class Answer:
    """tokens: the new ones of each prompt, with the one that ended it, if any.

    log_probabilities: natural logarithms, of every token of the vocabulary after every prefix of
    each row but the whole of it: (rows, length - 1, vocabulary).
    """

    tokens: list[list[int]]
    log_probabilities: list[list[list[float]]]


def receive() -> Job:
    """The job that the command line names."""
    return Job(**json.loads(Path(sys.argv[1]).read_text()))


def give(answer: Answer) -> None:
    """Write the answer where the command line says."""
    Path(sys.argv[2]).write_text(json.dumps(asdict(answer)))
