"""How well artifacts predict and answer: each beside the baseline, on the same inputs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantkit.base.errors import InputError
from quantkit.base.names import dtype_name
from quantkit.base.parallel import return_large_blocks
from quantkit.base.progress import Progress
from quantkit.calibration.text import Rows, load_tokenizer
from quantkit.checkpoint.end_tokens import end_tokens
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.weights import Weights
from quantkit.documents.dataset import Document, read_dataset
from quantkit.engines import transformers as hf
from quantkit.formats.packed import open_artifact
from quantkit.judging import harness
from quantkit.judging.answers import Answer
from quantkit.judging.cases import Case, check_prompts, load_cases
from quantkit.judging.gates import check_measured, check_slices
from quantkit.judging.harness import Harness, HarnessRun
from quantkit.judging.intervals import with_intervals
from quantkit.judging.likelihood import (
    Divergence,
    FinalStates,
    compare_predictions,
    final_states,
    held_out_rows,
)
from quantkit.judging.naming import named_artifacts
from quantkit.judging.overlap import case_documents, check_overlap
from quantkit.judging.regression import answer_cases, judge_answers
from quantkit.lora.checkpoint import AdaptedCheckpoint
from quantkit.model.device import resolve_device
from quantkit.model.limits import Limits
from quantkit.model.rehearsal import rehearse
from quantkit.model.skeleton import Skeleton
from quantkit.model.stream import Stream
from quantkit.recipes.suite import LoadedSuite
from quantkit.results.quality import Qualities, Quality


def judge_quality(
    artifacts: Sequence[Path],
    baseline: Checkpoint,
    loaded: LoadedSuite,
    *,
    device: str,
    progress: Progress,
    allow_code: bool = False,
    allow_overlap: bool = False,
) -> Qualities:
    """Run the suite on the baseline, once, and on each artifact, and compare the two.

    An artifact's weights are unpacked from its files, and both sides compute in float32. The
    noise floor is the baseline computing in its own dtype, judged as if it were an artifact: a
    difference smaller than the noise floor's is rounding, not quantization. A baseline with
    adapters in it is also compared with its base, which shows what the adapters are worth.

    allow_code: run Python that the suite brings; allow_overlap: judge an artifact on text that it
    was calibrated on, too.

    Raises InputError for a quantized baseline, an artifact of another model, an unusable suite, or
    an artifact that was calibrated on the suite's text without ``allow_overlap``; MachineError
    where the model doesn't fit in memory or a package of the suite's tasks isn't installed.
    """
    return_large_blocks()
    judge = _Judge.prepare(baseline, loaded, device, allow_code=allow_code)
    progress.note(f"likelihood text: {judge.rows.found}")
    named = named_artifacts(artifacts, baseline)
    remarks = check_overlap(named, judge.texts, allow=allow_overlap)
    if judge.rows.remark is not None:
        remarks.append(f"likelihood {judge.rows.remark}: set likelihood.bos to true in the suite.")
    sources = [(name, open_artifact(path)) for name, path in named.items()]
    for _, source in sources:
        judge.check_fits(source)
    reference = judge.run(judge.checkpoint, torch.float32, "baseline", progress)
    own = judge.dtype
    floor = judge.quality(
        judge.checkpoint, own, f"baseline in {dtype_name(own)}", reference, progress
    )
    base = None
    if isinstance(judge.checkpoint, AdaptedCheckpoint):
        plain = judge.checkpoint.base
        base = judge.quality(plain, torch.float32, "base without adapter", reference, progress)
    qualities = [
        judge.quality(source, torch.float32, name, reference, progress) for name, source in sources
    ]
    return Qualities(
        baseline=judge.own_quality(reference),
        noise_floor=floor,
        base=base,
        artifacts=tuple(qualities),
        remarks=tuple(remarks),
    )


@dataclass(frozen=True)
class _Run:
    """What one model made of the suite: final hidden states, answers, harness results."""

    states: FinalStates
    answers: list[Answer] | None
    harness: HarnessRun | None


@dataclass(frozen=True)
class _Judge:
    """The suite's inputs, which every model gets, and the device that all of them compute on.

    rows: held-out text; texts: all text of the suite, as documents; end: ids of the tokens that end
    an answer; dtype: the baseline's own.
    """

    checkpoint: Checkpoint
    tokenizer: Any
    rows: Rows
    texts: list[Document]
    cases: list[Case] | None
    harness: Harness | None
    end: list[int]
    device: torch.device
    dtype: torch.dtype
    layers: int
    slice_cases: int

    @classmethod
    def prepare(
        cls, checkpoint: Checkpoint, loaded: LoadedSuite, device: str, *, allow_code: bool
    ) -> _Judge:
        """Read and check everything that the suite names, before any model runs."""
        suite = loaded.suite
        if checkpoint.config.get("quantization_config"):
            raise InputError(
                "is quantized, so it can't be the baseline",
                subject=str(checkpoint.directory),
                fix="Pass the BF16 checkpoint that the artifact was made from.",
            )
        skeleton = Skeleton(checkpoint)
        rehearse(skeleton)
        limits = Limits.of(skeleton, checkpoint)
        check_measured(suite, experts=skeleton.has_experts)
        tokenizer = load_tokenizer(checkpoint.tokenizer)
        rows = held_out_rows(loaded, limits, tokenizer)
        texts = list(read_dataset(loaded.likelihood_dataset()).documents)
        cases = tasks = None
        if suite.regression is not None:
            path = loaded.resolve(suite.regression.cases)
            cases = load_cases(path, allow_code=allow_code)
            check_slices(suite, cases)
            check_prompts(cases, tokenizer, limits)
            texts += case_documents(cases, path)
        if (wanted := loaded.harness_tasks()) is not None:
            tasks = Harness(wanted, allow_code=allow_code)
            tasks.check_metrics([gate.metric for gate in suite.gates])
        where = resolve_device(device)
        if cases or tasks:
            purpose = "answering cases and harness tasks"
            hf.check_memory(checkpoint.parameters(), torch.float32, purpose, where)
        return cls(
            checkpoint=checkpoint,
            tokenizer=tokenizer,
            rows=rows,
            texts=texts,
            cases=cases,
            harness=tasks,
            end=end_tokens(checkpoint.tokenizer, tokenizer),
            device=where,
            dtype=skeleton.model.dtype,
            layers=len(skeleton.layers),
            slice_cases=suite.regression.slice_cases if suite.regression else 1,
        )

    def check_fits(self, source: Weights) -> None:
        """Raise InputError where an artifact's tensors aren't those of the baseline."""
        try:
            Skeleton(self.checkpoint, weights=source)
        except InputError as error:
            raise InputError(
                f"doesn't fit the baseline: {error.what}",
                subject=error.where,
                fix="Compare it with the checkpoint that it was made from.",
            ) from error

    def run(self, source: Weights, dtype: torch.dtype, label: str, progress: Progress) -> _Run:
        """Run a model on the suite: its rows block by block, then its cases and harness tasks."""
        stream = Stream(Skeleton(self.checkpoint, dtype, source), source, self.device)
        answers = ran = None
        steps = self.layers + bool(self.cases) + bool(self.harness)
        with progress.task(f"judge {label}", steps) as task:
            states = final_states(stream, self.rows.ids, partial(task.advance, doing="likelihood"))
            with stream.whole() if self.cases or self.harness else nullcontext() as model:
                if self.cases is not None:
                    generate = partial(hf.generate, model, end=self.end)
                    score = partial(hf.score, model)
                    answers = answer_cases(self.cases, self.tokenizer, generate, score)
                    task.advance(doing="regression cases")
                if self.harness is not None:
                    ran = self.harness.run(
                        model, self.tokenizer, lambda doing: task.advance(0, doing=doing)
                    )
                    task.advance()
        return _Run(states, answers, ran)

    def quality(
        self,
        source: Weights,
        dtype: torch.dtype,
        label: str,
        reference: _Run,
        progress: Progress,
    ) -> Quality:
        """Run a model on the suite and compare it with the baseline's run, ``reference``."""
        run = self.run(source, dtype, label, progress)
        divergence = compare_predictions(reference.states, run.states)
        return with_intervals(self._compare(divergence, run, reference, dtype))

    def own_quality(self, reference: _Run) -> Quality:
        """The baseline's own figures, without a ratio or a divergence."""
        divergence = compare_predictions(reference.states, reference.states)
        quality = self._compare(divergence, reference, reference, torch.float32)
        return with_intervals(
            replace(
                quality,
                perplexity=divergence.baseline_perplexity(),
                kl_divergence=None,
                top1_agreement=None,
                experts_changed=None,
            )
        )

    def _compare(
        self, divergence: Divergence, run: _Run, reference: _Run, dtype: torch.dtype
    ) -> Quality:
        result = None
        if self.cases is not None and run.answers is not None and reference.answers is not None:
            result = judge_answers(self.cases, run.answers, reference.answers, self.slice_cases)
        tasks = None
        if run.harness is not None and reference.harness is not None:
            tasks = harness.pair_runs(run.harness, reference.harness)
        return replace(
            divergence.quality(dtype_name(dtype)),
            regression=result,
            harness=tasks,
            beginning=self.rows.beginning,
        )
