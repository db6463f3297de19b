"""evaluate: artifact × suite → quality, against the baseline on the same inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.calibration.text import load_tokenizer
from quantkit.checkpoint.adapted import AdaptedCheckpoint
from quantkit.checkpoint.reader import Checkpoint, Weights
from quantkit.engines import hf
from quantkit.errors import InputError
from quantkit.formats.packed import open_artifact
from quantkit.model.adapt import tokenizer_directory
from quantkit.model.device import resolve_device
from quantkit.model.skeleton import Skeleton
from quantkit.model.stream import Stream
from quantkit.parallel import return_large_blocks
from quantkit.progress import Progress
from quantkit.quality import regression
from quantkit.quality.held_out import held_out_rows
from quantkit.quality.intervals import with_intervals
from quantkit.quality.likelihood import Divergence, Finished, compare, finish
from quantkit.quality.regression import Case
from quantkit.results import Qualities, Quality, split_tag
from quantkit.suite import LoadedSuite, Suite


def evaluate(
    artifacts: Sequence[Path],
    baseline: Checkpoint,
    loaded: LoadedSuite,
    *,
    device: str,
    progress: Progress,
) -> Qualities:
    """Judge artifacts by the suite; the baseline is run once for all of them.

    Weights are unpacked from what lies on disk, and both sides compute in float32. The noise
    floor is the baseline computing in its own dtype, judged as if it were an artifact: what lies
    below its figures is rounding, not quantization. A baseline with adapters in it is compared
    with its base in the same way, which shows what the adapters are worth.
    """
    return_large_blocks()
    bench = _Bench.prepare(baseline, loaded, device)
    sources = [(path.name, open_artifact(path)) for path in artifacts]
    for _, source in sources:
        bench.check_fits(source)
    reference = bench.run(bench.checkpoint, torch.float32, "baseline", progress)
    own = bench.dtype
    floor = bench.judge(bench.checkpoint, own, f"baseline in {_name(own)}", reference, progress)
    base = None
    if isinstance(bench.checkpoint, AdaptedCheckpoint):
        plain = bench.checkpoint.base
        base = bench.judge(plain, torch.float32, "base without adapter", reference, progress)
    judged = [
        bench.judge(source, torch.float32, name, reference, progress) for name, source in sources
    ]
    return Qualities(bench.judge_itself(reference), floor, base, tuple(judged))


@dataclass(frozen=True)
class _Run:
    """A model after the rows and the cases: final hidden states, and answers."""

    finished: Finished
    answers: list[str] | None


@dataclass(frozen=True)
class _Bench:
    """What every model under judgement shares: rows, cases, tokenizer, and where it computes."""

    checkpoint: Checkpoint
    tokenizer: Any
    rows: Tensor
    cases: list[Case] | None
    end: list[int]
    device: torch.device
    dtype: torch.dtype
    layers: int
    slice_cases: int

    @classmethod
    def prepare(cls, checkpoint: Checkpoint, loaded: LoadedSuite, device: str) -> _Bench:
        suite = loaded.suite
        if checkpoint.config.get("quantization_config"):
            raise InputError(
                "is quantized, so it can't be the baseline",
                where=str(checkpoint.directory),
                mend="Pass the BF16 checkpoint that the artifact was made of.",
            )
        skeleton = Skeleton(checkpoint)
        tokenizer = load_tokenizer(tokenizer_directory(checkpoint))
        rows = held_out_rows(loaded, checkpoint, tokenizer)
        cases = None
        if suite.regression is not None:
            cases = regression.load_cases(loaded.resolve(suite.regression.cases))
            _check_slices(suite, cases)
            hf.check_memory(
                checkpoint.parameters(), torch.float32, "answering the regression cases"
            )
        return cls(
            checkpoint,
            tokenizer,
            rows,
            cases,
            hf.end_tokens(checkpoint.directory, tokenizer),
            resolve_device(device),
            skeleton.model.dtype,
            len(skeleton.layers),
            suite.regression.slice_cases if suite.regression else 1,
        )

    def check_fits(self, source: Weights) -> None:
        """Raise InputError when an artifact's tensors aren't those of the baseline."""
        try:
            Skeleton(self.checkpoint, weights=source)
        except InputError as error:
            raise InputError(
                f"doesn't fit the baseline: {error.what}",
                where=error.where,
                mend="Is it made of this baseline?",
            ) from error

    def run(self, source: Weights, dtype: torch.dtype, label: str, progress: Progress) -> _Run:
        """Carry the rows through the blocks and answer the cases."""
        stream = Stream(Skeleton(self.checkpoint, dtype, source), source, self.device)
        answers = None
        steps = self.layers + (1 if self.cases else 0)
        with progress.task(f"judge {label}", steps) as task:
            finished = finish(stream, self.rows, partial(task.advance, doing="likelihood"))
            if self.cases is not None:
                with stream.whole() as model:
                    generate = partial(hf.generate, model, end=self.end)
                    answers = regression.answer(self.cases, self.tokenizer, generate)
                task.advance(doing="regression cases")
        return _Run(finished, answers)

    def judge(
        self,
        source: Weights,
        dtype: torch.dtype,
        label: str,
        reference: _Run,
        progress: Progress,
    ) -> Quality:
        run = self.run(source, dtype, label, progress)
        divergence = compare(reference.finished, run.finished)
        return with_intervals(self._quality(divergence, run, reference, dtype))

    def judge_itself(self, reference: _Run) -> Quality:
        """The baseline's own figures: no ratio, no divergence."""
        divergence = compare(reference.finished, reference.finished)
        quality = self._quality(divergence, reference, reference, torch.float32)
        return with_intervals(
            replace(
                quality,
                perplexity=divergence.baseline_perplexity(),
                kl_divergence=None,
                top1_agreement=None,
            )
        )

    def _quality(
        self, divergence: Divergence, run: _Run, reference: _Run, dtype: torch.dtype
    ) -> Quality:
        result = None
        if self.cases is not None and run.answers is not None and reference.answers is not None:
            result = regression.judge(self.cases, run.answers, reference.answers, self.slice_cases)
        rows, length = self.rows.shape
        return Quality(
            divergence.perplexity(),
            divergence.kl_divergence(),
            divergence.top1_agreement(),
            result,
            _name(dtype),
            rows,
            length,
            divergence.row_sums(),
        )


def _check_slices(suite: Suite, cases: Sequence[Case]) -> None:
    """Raise InputError for a gate on a slice that the cases don't have."""
    sizes = Counter(tag for case in cases for tag in set(case.tags))
    least = suite.regression.slice_cases if suite.regression else 1
    for number, gate in enumerate(suite.gates):
        tag, name = split_tag(gate.metric)
        if tag is not None and tag not in sizes:
            raise InputError(
                f"no case has the tag {tag}",
                where=f"gates.{number}",
                mend=f"Tags: {', '.join(sorted(sizes))}." if sizes else "No case has tags.",
            )
        if "worst_slice" in name and max(sizes.values(), default=0) < least:
            raise InputError(
                f"no tag has {least} cases, so there is no slice to look at",
                where=f"gates.{number}",
                mend="Give cases tags, or set regression.slice_cases lower.",
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
