"""Perplexity, KL divergence and top-1 agreement of two models on the same rows.

Both models are streamed block by block and only their final hidden states are kept. The heads
are then applied together in slices of the vocabulary, with running log-sum-exps, so that neither
the logits nor a model are ever whole in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.judging.significance import mean_interval
from quantkit.model.stream import Batch, Stream, slices
from quantkit.results.quality import KlDivergence, Perplexity, RowSums

TOKENS_PER_BATCH = 2048


@dataclass(frozen=True)
class Finished:
    """Rows that have passed all blocks of a model: their final hidden states, and its head."""

    stream: Stream
    batches: list[Batch]


def finish(stream: Stream, rows: Tensor, step: Callable[[], None] = lambda: None) -> Finished:
    """Carry ``rows`` (rows, tokens) through all blocks; ``step`` is called after each."""
    batches = stream.begin(rows, max(1, TOKENS_PER_BATCH // rows.shape[1]))
    for index in range(len(stream.skeleton.layers)):
        with stream.block(index) as block:
            stream.advance(index, block, batches)
        step()
    return Finished(stream, batches)


@dataclass(frozen=True)
class Divergence:
    """Figures of each predicted token, (rows, tokens - 1), float64 on CPU.

    nll, baseline_nll: negative log-likelihood of the true next token; kl: KL(baseline ‖ variant)
    of the two distributions, in nats; agrees: whether both rank the same token first.
    """

    nll: Tensor
    baseline_nll: Tensor
    kl: Tensor
    agrees: Tensor

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
        return RowSums((tokens,) * rows, nll, baseline_nll, kl, agreed)

    def kl_divergence(self) -> KlDivergence:
        sums = self.row_sums()
        low, high = mean_interval(sums.kl, sums.tokens)
        p99 = torch.quantile(self.kl.flatten(), 0.99) if self.kl.numel() < 16e6 else None
        if p99 is None:  # torch.quantile refuses more
            p99 = self.kl.flatten().kthvalue(math.ceil(0.99 * self.kl.numel())).values
        return KlDivergence(self.kl.mean().item(), max(float(low), 0.0), float(high), p99.item())

    def top1_agreement(self) -> float:
        return self.agrees.double().mean().item()


def _stderr(values: Tensor) -> Tensor:
    """Standard error of the mean, with sequences as the independent units."""
    means = values.mean(1)
    return means.std() / math.sqrt(len(means)) if len(means) > 1 else torch.tensor(math.nan)


def compare(
    baseline: Finished, variant: Finished, step: Callable[[], None] = lambda: None
) -> Divergence:
    """Walk the vocabulary with both heads; ``step`` is called after each slice."""
    parts = [_Running(batch.ids) for batch in baseline.batches]
    with baseline.stream.head() as logits_p, variant.stream.head() as logits_q:
        # A slice of both heads is read once, for all rows.
        for part in slices(baseline.stream.vocabulary):
            for place, running in enumerate(parts):
                p = logits_p(baseline.batches[place], part)
                q = p if variant is baseline else logits_q(variant.batches[place], part)
                running.add(p, q, part)
            step()
    return Divergence(
        *(
            torch.cat([getattr(running, name)() for running in parts])
            for name in ("nll", "baseline_nll", "kl", "agrees")
        )
    )


class _Running:
    """Sums over the vocabulary so far, for one batch. p is the baseline, q the variant.

    Exponentials are taken in float32 and summed in float64.
    """

    def __init__(self, ids: Tensor) -> None:
        self.labels = ids[:, 1:]
        shape, device = self.labels.shape, ids.device
        minus = torch.full(shape, -torch.inf, device=device)
        zero = torch.zeros(shape, dtype=torch.float64, device=device)
        # Largest logit so far and sum of exp(z - largest); for p also that sum weighted by zp - zq.
        self.max_p, self.max_q = minus.clone(), minus.clone()
        self.sum_p, self.sum_q, self.gap = zero.clone(), zero.clone(), zero.clone()
        self.label_p, self.label_q = minus.clone(), minus.clone()
        self.best_p = torch.zeros(shape, dtype=torch.int64, device=device)
        self.best_q = self.best_p.clone()

    def add(self, logits_p: Tensor, logits_q: Tensor, part: slice) -> None:
        """Take in one slice of logits (rows, tokens, slice)."""
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
        # sum p (log p - log q) = sum p (zp - zq) - log Zp + log Zq; rounding may go below zero.
        value = self.gap / self.sum_p - self._log_sum("p") + self._log_sum("q")
        return value.clamp(min=0).cpu()

    def agrees(self) -> Tensor:
        return (self.best_p == self.best_q).cpu()


def _sum(values: Tensor) -> Tensor:
    return values.sum(-1, dtype=torch.float64)
