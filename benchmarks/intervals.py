"""How often 95% intervals over rows cover the true mean, by kind: tables for docs/quality.md.

    python -m benchmarks.intervals [--rows 64 128] [--draws 10000]

The rows of the demo suite are treated as the whole population. Samples are drawn from them with
replacement; a cell gives the percentage of samples whose interval covers the population's mean, and
in brackets the percentage whose interval ends below it, which should be 2.5.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

from quantkit.judging.significance import mean_interval

DATA = Path(__file__).resolve().parents[1] / "tests" / "data" / "demo_row_sums.json"
RESAMPLES = 1999
AT_ONCE = 500
Array = np.ndarray[Any, np.dtype[Any]]
Ends = tuple[Array, Array]


def intervals(values: Array) -> dict[str, Ends]:
    """Ends of the mean's 95% interval, (draws) each, by kind of interval; values: (draws, rows)."""
    draws, rows = values.shape
    mean = values.mean(1)
    rest = values - mean[:, None]
    deviation = np.sqrt((rest**2).sum(1) / (rows - 1) / rows)
    counts = np.random.default_rng(0).multinomial(rows, np.full(rows, 1 / rows), RESAMPLES)
    error = counts @ rest.T / rows
    spread = np.sqrt(np.maximum(counts @ (rest**2).T / rows - error**2, 0) / (rows - 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        studentized = np.sort(error / spread, axis=0)
    error.sort(axis=0)
    low, high = round(0.025 * (RESAMPLES + 1)) - 1, round(0.975 * (RESAMPLES + 1)) - 1
    z, t = ndtri(0.975), stdtrit(rows - 1, 0.975)
    shift = ndtri((error < 0).mean(0))
    skew = (rest**3).sum(1) / (6 * ((rest**2).sum(1)) ** 1.5)
    ends = (shift + z * sign for sign in (-1, 1))
    ranks = (ndtr(shift + end / (1 - skew * end)) * RESAMPLES for end in ends)
    places = [np.clip(rank.astype(int), 0, RESAMPLES - 1) for rank in ranks]
    column = np.arange(draws)
    return {
        "mean ± 1.96 standard errors": (mean - z * deviation, mean + z * deviation),
        "Student's t": (mean - t * deviation, mean + t * deviation),
        "bootstrap, percentiles": (mean + error[low], mean + error[high]),
        "bootstrap, BCa": (mean + error[places[0], column], mean + error[places[1], column]),
        "bootstrap-t": (mean - studentized[high] * deviation, mean - studentized[low] * deviation),
        "QuantKit's": mean_interval(values, np.ones(rows)),
    }


def covered(values: Array, rows: int, draws: int) -> dict[str, str]:
    """By kind of interval: "covered (ended below the truth)" in percent of ``draws`` samples."""
    generator, truth = np.random.default_rng(3), values.mean()
    shares: dict[str, list[tuple[float, float]]] = {}
    for _ in range(draws // AT_ONCE):
        drawn = values[generator.integers(0, len(values), (AT_ONCE, rows))]
        for kind, (low, high) in intervals(drawn).items():
            inside = (low <= truth) & (truth <= high)
            shares.setdefault(kind, []).append((inside.mean(), (high <= truth).mean()))
    means = {kind: 100 * np.mean(parts, axis=0) for kind, parts in shares.items()}
    return {kind: f"{inside:.1f} ({below:.1f})" for kind, (inside, below) in means.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--draws", type=int, default=10_000)
    arguments = parser.parse_args()
    made = json.loads(DATA.read_text())
    sides, baseline = made["artifacts"], np.array(made["baseline_nll"])
    figures = {
        "KL divergence": {name: np.array(side["kl"]) for name, side in sides.items()},
        "log perplexity ratio": {n: np.array(side["nll"]) - baseline for n, side in sides.items()},
    }
    for rows in arguments.rows:
        for figure, by_name in figures.items():
            cells = [
                covered(sums / made["tokens"], rows, arguments.draws) for sums in by_name.values()
            ]
            print(f"\n| {figure}, {rows} rows | {' | '.join(by_name)} |")
            print("|---" * (len(by_name) + 1) + "|")
            for kind in cells[0]:
                print(f"| {kind} | {' | '.join(cell[kind] for cell in cells)} |", flush=True)


if __name__ == "__main__":
    main()
