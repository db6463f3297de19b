"""What quantkit predicts that an engine computes from an artifact, and how far the engine is off.

The prediction is the model in float32 with weights unpacked from the artifact, and inputs rounded
where its format has engines round them. Engines are asked for the log-probabilities of the whole
vocabulary. Less their mean these are the logits less theirs, so that is what is compared:

    error = ‖engine - prediction‖ / ‖prediction‖

over all places together, which must be within the tolerance, and at each, where it may be four
times that: with inputs rounded to FP8, merely computing in float16 moves a place by a tenth.

Greedy tokens are judged one by one, each after the tokens that the engine itself wrote before it,
so that one tie doesn't spoil all that follow. A tie: the engine's token isn't the likeliest, but
its logit is nearer to the best than four times the tolerance, of the spread of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.packed import open_artifact
from quantkit.model.skeleton import Skeleton
from quantkit.model.stream import Stream
from tests.compatibility.scripts.exchange import Answer, Job

_SLACK = 4  # times the tolerance: a single place or logit is off by more than all together

Logits = Callable[[list[list[int]]], Tensor]


class Disagreement(Exception):
    """The answer doesn't fit the question."""


@dataclass(frozen=True)
class Agreement:
    """How an engine's answer compares with the prediction.

    error, worst: relative, of all places together and of the worst. tokens: number of greedy ones;
    equal: of those that were predicted; ties: of those that the tolerance lets pass as such.
    """

    error: float
    worst: float
    tokens: int
    equal: int
    ties: int

    def holds(self, tolerance: float) -> bool:
        near = self.error <= tolerance and self.worst <= _SLACK * tolerance
        return near and self.equal + self.ties == self.tokens


@contextmanager
def predicted(artifact: Path, baseline: Checkpoint) -> Iterator[Logits]:
    """A function from rows of equal length to logits (rows, length, vocabulary), float32."""
    skeleton = Skeleton(baseline, torch.float32)
    with Stream(skeleton, open_artifact(artifact), torch.device("cpu")).whole() as model:

        @torch.inference_mode()
        def logits(rows: list[list[int]]) -> Tensor:
            result: Tensor = model(torch.tensor(rows)).logits
            return result

        yield logits


def compare(job: Job, answer: Answer, logits: Logits, tolerance: float) -> Agreement:
    """Compare an engine's answer with the prediction. Raises Disagreement for a wrong shape."""
    expected = _centred(logits(job.rows)[:, :-1])
    given = torch.tensor(answer.log_probabilities)
    if given.shape != expected.shape:
        raise Disagreement(
            f"log-probabilities of shape {tuple(given.shape)}, not {tuple(expected.shape)}"
        )
    difference = _centred(given) - expected
    error = float(difference.norm() / expected.norm())
    worst = float((difference.norm(dim=-1) / expected.norm(dim=-1)).max())
    if len(answer.tokens) != len(job.prompts):
        raise Disagreement(f"{len(answer.tokens)} answers to {len(job.prompts)} prompts")
    equal = ties = 0
    for prompt, tokens in zip(job.prompts, answer.tokens, strict=True):
        _check_end(tokens, job)
        steps = _centred(logits([prompt + tokens])[0, len(prompt) - 1 : -1])
        chosen = steps.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        short = steps.amax(-1) - chosen
        near = short <= _SLACK * tolerance * steps.square().mean(-1).sqrt()
        equal += int((short == 0).sum())
        ties += int((near & (short > 0)).sum())
    total = sum(map(len, answer.tokens))
    return Agreement(error, worst, total, equal, ties)


def _centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(-1, keepdim=True)


def _check_end(tokens: list[int], job: Job) -> None:
    """Raise Disagreement unless there are as many tokens as asked for, or an end."""
    length = next((n for n, token in enumerate(tokens, 1) if token in job.end), job.new_tokens)
    if len(tokens) != length:
        raise Disagreement(f"{len(tokens)} tokens where the answer has {length}")
