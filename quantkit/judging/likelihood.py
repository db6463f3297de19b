"""Perplexity, KL divergence and top-1 agreement of two models on the same rows of text.

Both models are streamed block by block, and only their final hidden states are kept. The output
embeddings are then applied together, a slice of the vocabulary at a time, with running
log-sum-exps. Neither a whole model nor all logits are ever in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantkit.base.errors import InputError
from quantkit.calibration import passing
from quantkit.calibration.text import Rows, pack_rows
from quantkit.judging import routing
from quantkit.model.limits import Limits, check_length
from quantkit.model.stream import Batch, Stream, slices
from quantkit.recipes.suite import LoadedSuite
from quantkit.results.quality import ExpertsChanged, KlDivergence, Perplexity, Quality, RowSums

TOKENS_PER_BATCH = 2048
_COLUMNS = 2048  # of the vocabulary at once
_LOGITS_ON_GPU = 1 << 27  # at once, at most
_BYTES_PER_LOGIT = 256  # of a device's memory: enough for what a comparison makes of a logit


def tokens_per_batch(device: torch.device) -> int:
    """How many tokens pass through a model together on ``device``.

    As everywhere here, it depends on the memory that the device has, not on what is free, so that
    two runs on one device make the same sums.
    """
    if device.type != "cuda":
        return TOKENS_PER_BATCH
    return max(TOKENS_PER_BATCH, passing.tokens_per_batch(device))


def columns_per_slice(device: torch.device) -> int:
    """How many rows of the output embeddings are applied at once to a batch on ``device``."""
    # Each slice runs what a model does around its head, which costs a GPU more than the product.
    if device.type != "cuda":
        return _COLUMNS
    memory = torch.cuda.get_device_properties(device).total_memory
    logits = min(_LOGITS_ON_GPU, memory // _BYTES_PER_LOGIT)
    return max(1, logits // tokens_per_batch(device) // _COLUMNS) * _COLUMNS


def held_out_rows(loaded: LoadedSuite, limits: Limits, tokenizer: Any) -> Rows:
    """The suite's held-out text as rows of tokens.

    limits: the model's. Raises InputError where the text fills fewer than two rows.
    """
    likelihood = loaded.suite.likelihood
    check_length(likelihood.sequence_length, limits, "likelihood")
    dataset = loaded.likelihood_dataset()
    rows = pack_rows(
        dataset,
        tokenizer,
        sequence_length=likelihood.sequence_length,
        rows=likelihood.rows,
        seed=None,  # held-out text keeps its order
        bos=likelihood.bos,
        limits=limits,
    )
    if rows.count < 2:
        raise InputError(
            "fills only one row of tokens, and intervals need at least two",
            subject=str(dataset),
            fix="Give more text or a shorter sequence_length.",
        )
    return rows


@dataclass(frozen=True)
class FinalStates:
    """The hidden states of rows after the last block of a model.

    stream: the model, whose head is still to be applied; batches: the rows, in order; choices: the
    experts of each token by the number of a layer that has some (``routing.choices``), none where
    they weren't noted.
    """

    stream: Stream
    batches: list[Batch]
    choices: Mapping[int, Tensor] = field(default_factory=dict)


def final_states(
    stream: Stream, rows: Tensor, step: Callable[[], None] = lambda: None
) -> FinalStates:
    """Run all blocks on ``rows`` (rows, tokens); ``step`` is called after each block."""
    batches = stream.begin(rows, max(1, tokens_per_batch(stream.device) // rows.shape[1]))
    choices: dict[int, Tensor] = {}
    known = True
    for index in range(len(stream.skeleton.layers)):
        experts = stream.skeleton.experts(index)
        with stream.block(index) as block, routing.noted(experts) as notes:
            stream.advance(index, block, batches)
        if experts and known:
            chosen = routing.choices(notes, rows)
            known = chosen is not None
            choices = {**choices, index: chosen} if chosen is not None else {}
        step()
    return FinalStates(stream, batches, choices)


@dataclass(frozen=True)
class Divergence:
    """How two models predict each token: tensors (rows, tokens - 1) on the CPU.

    nll, baseline_nll: negative log-likelihoods of the true next token, float64 in nats; kl:
    KL(baseline ‖ variant) of the predicted distributions, float64 in nats; agrees: whether both
    models rank the same token first, bool; rerouted: whether the token that predicts it has other
    experts in the variant, bool, by the number of a layer with experts.
    """

    nll: Tensor
    baseline_nll: Tensor
    kl: Tensor
    agrees: Tensor
    rerouted: Mapping[int, Tensor] = field(default_factory=dict)

    def perplexity(self) -> Perplexity:
        value = self.nll.mean().exp()
        ratio = (self.nll.mean() - self.baseline_nll.mean()).exp()
        return Perplexity(value.item(), (value * _stderr(self.nll)).item(), ratio.item())

    def baseline_perplexity(self) -> Perplexity:
        value = self.baseline_nll.mean().exp()
        return Perplexity(value.item(), (value * _stderr(self.baseline_nll)).item())

    def row_sums(self) -> RowSums:
        rows, tokens = self.nll.shape
        nll, baseline_nll, kl, agreed = (
            tuple(figure.sum(1).tolist())
            for figure in (self.nll, self.baseline_nll, self.kl, self.agrees)
        )
        changed = None
        if self.rerouted:
            shares = torch.stack(list(self.rerouted.values())).double().mean(0)
            changed = tuple(shares.sum(1).tolist())
        return RowSums((tokens,) * rows, nll, baseline_nll, kl, agreed, changed)

    def kl_divergence(self) -> KlDivergence:
        if self.kl.numel() < 16e6:
            p99 = torch.quantile(self.kl.flatten(), 0.99)
        else:  # more than torch.quantile accepts
            p99 = self.kl.flatten().kthvalue(math.ceil(0.99 * self.kl.numel())).values
        return KlDivergence(mean=self.kl.mean().item(), p99=p99.item())

    def top1_agreement(self) -> float:
        return self.agrees.double().mean().item()

    def experts_changed(self) -> ExpertsChanged | None:
        """None for models without experts."""
        if not self.rerouted:
            return None
        shares = {str(n): part.double().mean().item() for n, part in self.rerouted.items()}
        return ExpertsChanged(math.fsum(shares.values()) / len(shares), shares)

    def quality(self, dtype: str) -> Quality:
        """All of these figures as a result; ``dtype`` is the one that the variant computed in."""
        rows, predicted = self.nll.shape
        return Quality(
            perplexity=self.perplexity(),
            kl_divergence=self.kl_divergence(),
            top1_agreement=self.top1_agreement(),
            regression=None,
            dtype=dtype,
            rows=rows,
            sequence_length=predicted + 1,
            row_sums=self.row_sums(),
            experts_changed=self.experts_changed(),
        )


def _stderr(values: Tensor) -> Tensor:
    """Standard error of the mean, with rows as the independent units."""
    means = values.mean(1)
    return means.std() / math.sqrt(len(means)) if len(means) > 1 else torch.tensor(math.nan)


def compare_predictions(
    baseline: FinalStates, variant: FinalStates, step: Callable[[], None] = lambda: None
) -> Divergence:
    """Compare the two models' distributions at every token, slice by slice of the vocabulary.

    ``baseline`` and ``variant`` have seen the same rows; they may be the same object. ``step`` is
    called after each slice.
    """
    parts = [_Running(batch.ids) for batch in baseline.batches]
    with baseline.stream.head() as logits_p, variant.stream.head() as logits_q:
        # The vocabulary is the outer loop, so that each slice of the heads is read only once.
        columns = columns_per_slice(baseline.stream.device)
        for part in slices(baseline.stream.vocabulary, columns):
            for place, running in enumerate(parts):
                p = logits_p(baseline.batches[place], part)
                q = p if variant is baseline else logits_q(variant.batches[place], part)
                running.add(p, q, part)
            step()
    nll, baseline_nll, kl, agrees = (
        torch.cat([getattr(running, name)() for running in parts])
        for name in ("nll", "baseline_nll", "kl", "agrees")
    )
    rerouted = routing.changed(baseline.choices, variant.choices)
    predicting = {index: part[:, :-1] for index, part in rerouted.items()}
    return Divergence(nll, baseline_nll, kl, agrees, predicting)


class _Running:
    """Running sums over the vocabulary for one batch. p is the baseline, q the variant.

    Exponentials are taken in float32 and summed in float64.
    """

    def __init__(self, ids: Tensor) -> None:
        self.labels = ids[:, 1:]
        shape, device = self.labels.shape, ids.device
        minus = torch.full(shape, -torch.inf, device=device)
        zero = torch.zeros(shape, dtype=torch.float64, device=device)
        # max: the largest logit z so far; sum: Σ exp(z - max); gap: Σ exp(zp - max_p)·(zp - zq).
        self.max_p, self.max_q = minus.clone(), minus.clone()
        self.sum_p, self.sum_q, self.gap = zero.clone(), zero.clone(), zero.clone()
        self.label_p, self.label_q = minus.clone(), minus.clone()
        self.best_p = torch.zeros(shape, dtype=torch.int64, device=device)
        self.best_q = self.best_p.clone()

    def add(self, logits_p: Tensor, logits_q: Tensor, part: slice) -> None:
        """Add one slice of logits, (rows, tokens, slice)."""
        p, q = logits_p[:, :-1].float(), logits_q[:, :-1].float()
        top_p, at_p = p.max(-1)
        top_q, at_q = q.max(-1)
        self.best_p = torch.where(top_p > self.max_p, at_p + part.start, self.best_p)
        self.best_q = torch.where(top_q > self.max_q, at_q + part.start, self.best_q)
        new_p, new_q = torch.maximum(self.max_p, top_p), torch.maximum(self.max_q, top_q)
        shrink_p = (self.max_p - new_p).double().exp()
        shrink_q = (self.max_q - new_q).double().exp()
        weight = (p - new_p[..., None]).exp_()
        self.sum_p = self.sum_p * shrink_p + _sum(weight)
        self.gap = self.gap * shrink_p + _sum(weight.mul_(p - q))
        self.sum_q = self.sum_q * shrink_q + _sum((q - new_q[..., None]).exp_())
        self.max_p, self.max_q = new_p, new_q
        inside = (self.labels >= part.start) & (self.labels < part.stop)
        column = (self.labels - part.start).clamp(0, p.shape[-1] - 1)[..., None]
        self.label_p = torch.where(inside, p.gather(-1, column)[..., 0], self.label_p)
        self.label_q = torch.where(inside, q.gather(-1, column)[..., 0], self.label_q)

    def _log_sum(self, which: str) -> Tensor:
        total: Tensor = getattr(self, f"max_{which}").double() + getattr(self, f"sum_{which}").log()
        return total

    def nll(self) -> Tensor:
        return (self._log_sum("q") - self.label_q).cpu()

    def baseline_nll(self) -> Tensor:
        return (self._log_sum("p") - self.label_p).cpu()

    def kl(self) -> Tensor:
        # Σ p (log p - log q) = Σ p (zp - zq) - log Zp + log Zq, which rounding may push below 0.
        value = self.gap / self.sum_p - self._log_sum("p") + self._log_sum("q")
        return value.clamp(min=0).cpu()

    def agrees(self) -> Tensor:
        return (self.best_p == self.best_q).cpu()


def _sum(values: Tensor) -> Tensor:
    return values.sum(-1, dtype=torch.float64)
