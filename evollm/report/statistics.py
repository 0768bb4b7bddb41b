"""95 % intervals of scores, and of differences between two agents' scores, over the choice of held-out rows.

Every score is a ratio of two sums over the rows: the denominators of accuracy and margin are 1 for each pair, those of
the loss are the tokens of each row. The intervals do not cover another seed or another order of the training data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from evollm.errors import ConfigurationError
from evollm.hpo import AnyEvaluation
from evollm.hpo.fitness import TIE, FloatArray
from evollm.runs.words import Words

LEVEL = 0.95
# The 97.5th percentile of the normal distribution.
Z = 1.959963984540054
RESAMPLES = 10_000
# Fewer rows give no interval: even if all of them favour one agent, the two-sided sign test's p-value is above 0.05.
FEWEST_ROWS = 6
# Fewer rows give a warning: on 100 pairs the interval of an accuracy is about 10 points wide to each side.
FEW_ROWS = 100
# Row indices drawn at a time, which bounds the memory.
_DRAWS_AT_A_TIME = 2**21


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval; the ends are NaN where there are too few rows, or a value is not finite.

    Attributes:
        value: The score or difference.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    @property
    def is_finite(self) -> bool:
        """Whether all three are finite numbers."""
        return all(map(math.isfinite, (self.value, self.low, self.high)))

    @property
    def includes_zero(self) -> bool:
        """Whether the sign of a difference is open; True for an interval whose ends are NaN."""
        return not (self.low > 0 or self.high < 0)


def few_rows(words: Words, *, agents: int, test: int, final: int) -> str:
    """Return a warning if there are fewer than 100 held-out rows of a split; "" if there are enough, or none.

    Args:
        words: The words of the algorithm.
        agents: Size of the population, which is selected by its scores on the `test` rows.
        test: Rows on which agents are evaluated during the run.
        final: Rows of the final score, by which nothing is selected.
    """
    uses = {"the selection" if agents > 1 else "the evaluations": test, "the final score": final}
    few = {use: count for use, count in uses.items() if 0 < count < FEW_ROWS}
    if not few:
        return ""
    counts = " and ".join(f"{count} for {use}" for use, count in few.items())
    fewest = min(few.values())
    precision, noun, score = "", words.noun, words.shown[0]
    if score.is_share:
        # At a share of 0.5 the interval is widest.
        article = "An" if score.label[:1] in "aeiou" else "A"
        precision = f" {article} {score.label} on {fewest} {noun}{'' if fewest == 1 else 's'} is known to within about "
        precision += f"{100 * (wilson(0.5, fewest).high - 0.5):.0f} points."
    return (
        f"Few held-out {noun}s: {counts}.{precision} To tell a gain from chance give {FEW_ROWS} or more for each: as "
        "test_data and final_data, of a gym test_dataset and final_dataset."
    )


def wilson(share: float, count: int) -> Interval:
    """Wilson's score interval of a share (Wilson 1927): it lies within [0, 1], and has a width at 0 and 1, too.

    Args:
        share: The observed share; a tie may count half.
        count: Number of rows, at least 1.
    """
    if not math.isfinite(share):
        return Interval(share, math.nan, math.nan)
    center = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return Interval(share, min(share, max(0.0, center - half)), max(share, min(1.0, center + half)))


def ratio_interval(numerators: FloatArray, denominators: FloatArray) -> Interval:
    """Normal interval of sum(numerators) / sum(denominators) by linearisation; denominators of 1 give that of a mean.

    Args:
        numerators: (n,) one for each row.
        denominators: (n,) above 0.

    Returns:
        The interval; its ends are NaN for fewer than two rows.
    """
    count = len(numerators)
    with np.errstate(invalid="ignore", over="ignore"):
        value = float(numerators.sum() / denominators.sum())
        residuals = numerators - value * denominators
        squares = float(np.square(residuals).sum())
    if count < 2 or not math.isfinite(squares):  # noqa: PLR2004 - a variance needs two
        return Interval(value, math.nan, math.nan)
    error = math.sqrt(squares * count / (count - 1)) / float(denominators.sum())
    return Interval(value, value - Z * error, value + Z * error)


def score_interval(evaluation: AnyEvaluation, score: str) -> Interval:
    """Return a score with its interval: Wilson's for the accuracy and the win rate, else the normal one.

    Args:
        evaluation: The evaluation, row by row.
        score: `accuracy`, `mean_margin` or `loss`.

    Raises:
        ConfigurationError: The evaluation has no such score.
    """
    numerators, denominators = _ratio(evaluation, score)
    if score in ("accuracy", "win_rate"):
        share = float(numerators.mean())
        # If every pair ties, the model equals its reference, and other pairs would tie as well.
        ties = bool((numerators == TIE).all())
        return Interval(share, share, share) if ties else wilson(share, len(numerators))
    return ratio_interval(numerators, denominators)


def paired_difference(
    first: AnyEvaluation, second: AnyEvaluation, score: str, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Return first minus second with a paired bootstrap interval (percentiles; Efron 1979).

    Rows are drawn with replacement, the same rows for both agents, so that the difficulty of a row cancels out. If all
    rows have the same difference the interval has no width. For fewer than 6 rows its ends are NaN.

    Args:
        first: An agent's evaluation, row by row.
        second: Another agent's evaluation on the same rows.
        score: `accuracy`, `mean_margin` or `loss`.
        resamples: Number of bootstrap samples.
        seed: Seed of the draws.

    Raises:
        ConfigurationError: The two differ in type or number of rows.
    """
    if type(first) is not type(second):
        raise ConfigurationError("second", type(second).__name__, f"must be of the kind of {type(first).__name__}")
    (numerators, denominators), (others, _) = _ratio(first, score), _ratio(second, score)
    if len(numerators) != len(others):
        raise ConfigurationError("second", len(others), f"must hold the same {len(numerators)} rows as first")
    with np.errstate(invalid="ignore"):
        differences = numerators - others
    value = float(differences.sum() / denominators.sum())
    if not math.isfinite(value) or len(differences) < FEWEST_ROWS:
        return Interval(value, math.nan, math.nan)
    rng, count = np.random.default_rng(seed), len(differences)
    samples: list[FloatArray] = []
    at_a_time = max(1, _DRAWS_AT_A_TIME // count)
    for start in range(0, resamples, at_a_time):
        drawn = rng.integers(count, size=(min(at_a_time, resamples - start), count))
        samples.append(differences[drawn].sum(axis=1) / denominators[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(samples), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def _ratio(evaluation: AnyEvaluation, score: str) -> tuple[FloatArray, FloatArray]:
    """(n,) numerators and (n,) denominators of a score."""
    if score not in evaluation.ratios:
        raise ConfigurationError("score", score, f"is no score of a {type(evaluation).__name__}")
    return evaluation.ratios[score]
