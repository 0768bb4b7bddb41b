"""Intervals over seeds and pairs, and rank correlations."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from searching.records import Array

RESAMPLES = 2000


def hierarchical(per_seed: Sequence[Array]) -> tuple[float, float, float]:
    """Mean over seeds and its 95 % interval, by resampling seeds and, within each seed, pairs.

    Args:
        per_seed: For each seed (pairs,) numbers; the mean over pairs and seeds is the statistic.

    Returns:
        The mean, the lower and the upper bound.
    """
    low, high = np.percentile(_resampled(per_seed), [2.5, 97.5])
    return float(np.mean([values.mean() for values in per_seed])), float(low), float(high)


def reaching(runs: Array, per_seed: Sequence[Array], rival: int) -> tuple[float, float, float]:
    """The price at which the best contestants reach the score of one of them, and its 95 % interval.

    The best score up to a price is interpolated linearly between contestants. Which contestants are the best is chosen
    on the same scores, so the price is too low rather than too high.

    Args:
        runs: (contestants,) the price of each.
        per_seed: For each seed (pairs, contestants) scores, larger is better.
        rival: Index of the one whose score is to be reached.
    """
    low, high = np.percentile([_price(runs, means, rival) for means in _resampled(per_seed)], [2.5, 97.5])
    return _price(runs, np.mean([scores.mean(axis=0) for scores in per_seed], axis=0), rival), float(low), float(high)


def _price(runs: Array, means: Array, rival: int) -> float:
    order = np.argsort(runs, kind="stable")
    best = np.maximum.accumulate(means[order])
    first = int(np.argmax(best >= means[rival]))
    if first == 0:
        return float(runs[order[0]])
    last = int(np.argmax(best == best[first - 1]))
    before, after = runs[order[last]], runs[order[first]]
    return float(before + (after - before) * (means[rival] - best[last]) / (best[first] - best[last]))


def _resampled(per_seed: Sequence[Array]) -> Array:
    """(RESAMPLES, …) means over resampled seeds and pairs of (pairs, …) numbers for each seed."""
    means = np.stack([_shares(len(values)) @ values for values in per_seed])
    rng = np.random.default_rng(0)
    seeds = rng.integers(len(per_seed), size=(RESAMPLES, len(per_seed)))
    return np.asarray(means[seeds, rng.integers(RESAMPLES, size=seeds.shape)].mean(axis=1))


@cache
def _shares(count: int) -> Array:
    """(RESAMPLES, count) of each of `count` pairs in as many draws."""
    drawn = np.random.default_rng(1).integers(count, size=(RESAMPLES, count))
    return np.stack([np.bincount(row, minlength=count) for row in drawn]) / count


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's, ties with the mean of their ranks."""
    ranks = [_ranks(np.asarray(values, dtype=float)) for values in (first, second)]
    if min(one.std() for one in ranks) == 0:
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: Array) -> Array:
    return np.array([(values < value).sum() + ((values == value).sum() - 1) / 2 for value in values])
