"""Intervals over seeds and pairs, and rank correlations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from searching.records import Array

RESAMPLES = 2000


def hierarchical(per_seed: Sequence[Array], statistic: Callable[[Array], Array], seed: int = 0) -> tuple[float, ...]:
    """Mean over seeds and its 95 % interval, by resampling seeds and, within each seed, pairs.

    Args:
        per_seed: For each seed (choices, pairs): a number for each pair, for each equally likely choice of the seed.
        statistic: Maps (choices, pairs) to (choices,); means of pairs for an accuracy.
        seed: Of the resampling.

    Returns:
        The mean, the lower and the upper bound.
    """
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(RESAMPLES):
        drawn = rng.integers(len(per_seed), size=len(per_seed))
        means = []
        for number in drawn:
            values = per_seed[number]
            means.append(statistic(values[:, rng.integers(values.shape[1], size=values.shape[1])]).mean())
        found.append(np.mean(means))
    low, high = np.percentile(found, [2.5, 97.5])
    return float(np.mean([statistic(values).mean() for values in per_seed])), float(low), float(high)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's, ties with the mean of their ranks."""
    ranks = [_ranks(np.asarray(values, dtype=float)) for values in (first, second)]
    if min(one.std() for one in ranks) == 0:
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: Array) -> Array:
    return np.array([(values < value).sum() + ((values == value).sum() - 1) / 2 for value in values])
