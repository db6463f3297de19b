"""Confidence intervals and tests for two models on the same rows of text and the same cases.

Every interval is two-sided: at confidence 0.95 the true value may be beyond either end with a
probability of 0.025. How often that happens in fact was simulated on the demo model:
docs/quality.md has the figures, and tests keep them true.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.special import bdtr, betaincinv, ndtr, ndtri, stdtrit

Floats = npt.NDArray[np.float64]

_RESAMPLES = 1999
_COUNTS_AT_ONCE = 4_000_000
_HALVINGS = 60


@np.errstate(divide="ignore", invalid="ignore")
def mean_interval(
    sums: npt.ArrayLike, tokens: npt.ArrayLike, confidence: float = 0.95
) -> tuple[Floats, Floats]:
    """Interval of a mean over tokens, Σ sums / Σ tokens, with rows as the independent units.

    sums: (..., rows), the sum over the tokens of each row, for any number of figures; tokens:
    (rows,). Returns the lower and the upper ends, each of shape (...); NaN where a row's sum isn't
    finite.

    It is the bootstrap-t (Efron 1981; Hall 1988): rows are drawn again with replacement, and each
    resample's error is divided by its own standard error. The same number of rows always gets the
    same resamples, which all figures share. The tails are widened as in Hesterberg (2015, "What
    Teachers Should Know about the Bootstrap"), and no end is nearer than that of Student's t
    interval.
    """
    # Rows are heavy-tailed and skewed. Percentile and BCa intervals of such rows end too low; the
    # bootstrap-t follows the skewness, but is too short where both tails are heavy: hence Student's
    # t as the least. That also decides alone where a bootstrap has no bound, as for 2 or 3 rows.
    values, weights = np.asarray(sums, np.float64), np.asarray(tokens, np.float64)
    rows = values.shape[-1]
    mean = values.sum(-1) / weights.sum()
    rest = (values - mean[..., None] * weights).reshape(-1, rows)
    deviation = np.sqrt(rows / (rows - 1) * (rest**2).sum(1)) / weights.sum()
    drawn = _studentized(rest, weights)
    student = stdtrit(rows - 1, (1 + confidence) / 2)
    # Resamples of few rows vary less than the rows' population, by (rows - 1) / rows.
    tail = ndtr(-student * math.sqrt(rows / (rows - 1)))
    rank = max(int((_RESAMPLES + 1) * tail), 1)
    drawn.partition((rank - 1, _RESAMPLES - rank), axis=0)
    below = np.maximum(_finite(drawn[_RESAMPLES - rank]), student) * deviation
    above = np.minimum(_finite(drawn[rank - 1]), -student) * deviation
    return mean - below.reshape(mean.shape), mean - above.reshape(mean.shape)


def _studentized(rest: Floats, tokens: Floats) -> Floats:
    """The errors of resampled means divided by their own standard errors, (resamples, figures).

    rest: (figures, rows), the residual of each row's sum from its tokens times the mean.
    """
    rows = len(tokens)
    generator = np.random.default_rng(0)
    chances = np.full(rows, 1 / rows)
    parts = []
    step = max(_COUNTS_AT_ONCE // rows, 1)
    for begin in range(0, _RESAMPLES, step):
        size = min(step, _RESAMPLES - begin)
        counts = generator.multinomial(rows, chances, size=size).astype(np.float64)
        total = (counts @ tokens)[:, None]
        error = counts @ rest.T / total
        squares = counts @ (rest**2).T - 2 * error * (counts @ (rest * tokens).T)
        squares += error**2 * (counts @ tokens**2)[:, None]
        deviation = np.sqrt(rows / (rows - 1) * np.maximum(squares, 0)) / total
        parts.append(np.where(error == 0, 0.0, error / deviation))
    return np.concatenate(parts)


def _finite(values: Floats) -> Floats:
    return np.where(np.isfinite(values), values, 0.0)


def rate_interval(passed: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's exact interval (1934) of a rate; it covers at least ``confidence``."""
    tail = (1 - confidence) / 2
    low = betaincinv(passed, total - passed + 1, tail) if passed else 0.0
    high = betaincinv(passed + 1, total - passed, 1 - tail) if passed < total else 1.0
    return float(low), float(high)


def difference_interval(
    fixed: int, broken: int, total: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Tango's score interval (1998) of a difference of paired rates, (fixed - broken) / total,
    with a continuity correction."""
    moved = fixed - broken
    bound = float(ndtri((1 + confidence) / 2))

    def score(difference: float) -> float:
        """How many standard deviations the counts are from a true ``difference``."""
        slope = -fixed - broken + (2 * total - moved) * difference
        product = broken * difference * (1 - difference)
        root = math.sqrt(slope**2 + 8 * total * product)
        breaking = (root - slope) / (4 * total)  # likeliest rate of breaking, given the difference
        variance = total * (2 * breaking + difference * (1 - difference))
        # The counts move in whole cases, hence the half. Without it a worse model passed up to 5.3%
        # of the time at one end, with it up to 3.3% (2.5% is meant).
        distance = max(abs(moved - total * difference) - 0.5, 0.0)
        if variance <= 0:
            return math.inf if distance else 0.0
        return distance / math.sqrt(variance)

    def end(outer: float) -> float:
        inner = moved / total
        for _ in range(_HALVINGS):
            middle = (inner + outer) / 2
            inner, outer = (inner, middle) if score(middle) > bound else (middle, outer)
        return outer

    return end(-1.0), end(1.0)


def mcnemar(broken: int, fixed: int) -> float:
    """Two-sided p-value of McNemar's exact test that a case is as likely fixed as broken."""
    return min(1.0, 2 * float(bdtr(min(broken, fixed), broken + fixed, 0.5)))
