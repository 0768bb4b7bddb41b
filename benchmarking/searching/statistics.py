"""Intervals over seeds and pairs, and rank correlations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from searching.records import Array

RESAMPLES = 2000


def hierarchical(per_seed: Sequence[Array], seed: int = 0) -> tuple[float, float, float]:
    """Mean over seeds and its 95 % interval, by resampling seeds and, within each seed, pairs.

    Args:
        per_seed: For each seed (pairs,) numbers; the mean over pairs and seeds is the statistic.
        seed: Of the resampling.

    Returns:
        The mean, the lower and the upper bound.
    """
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(RESAMPLES):
        drawn = (per_seed[number] for number in rng.integers(len(per_seed), size=len(per_seed)))
        found.append(np.mean([values[rng.integers(len(values), size=len(values))].mean() for values in drawn]))
    low, high = np.percentile(found, [2.5, 97.5])
    return float(np.mean([values.mean() for values in per_seed])), float(low), float(high)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's, ties with the mean of their ranks."""
    ranks = [_ranks(np.asarray(values, dtype=float)) for values in (first, second)]
    if min(one.std() for one in ranks) == 0:
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: Array) -> Array:
    return np.array([(values < value).sum() + ((values == value).sum() - 1) / 2 for value in values])
