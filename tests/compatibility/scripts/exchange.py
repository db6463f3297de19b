"""The question to an engine, and its answer.

Standard library only: every engine's interpreter runs this.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """What an engine does with one artifact.

    path: of the artifact. dtype: that the engine computes in.
    prompts: token ids, each continued greedily by ``new_tokens``, or up to one of ``end``.
    rows: token ids, all of one length, whose log-probabilities are asked for.
    """

    path: str
    dtype: str
    prompts: list[list[int]]
    new_tokens: int
    end: list[int]
    rows: list[list[int]]


@dataclass(frozen=True)
class Answer:
    """What the engine computed.

    tokens: the new ones of each prompt, with the end token where there was one.
    log_probabilities: (rows, length - 1, vocabulary), natural logarithms, for the token that
    follows each prefix of a row; the whole row is no prefix.
    """

    tokens: list[list[int]]
    log_probabilities: list[list[list[float]]]


def receive() -> Job:
    """Read the job from the file that the command line names first."""
    return Job(**json.loads(Path(sys.argv[1]).read_text()))


def give(answer: Answer) -> None:
    """Write the answer to the file that the command line names second."""
    Path(sys.argv[2]).write_text(json.dumps(asdict(answer)))
