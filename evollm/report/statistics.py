"""How sure scores and differences are, given that they were measured on so many pairs.

Every score here is a ratio of sums over the rows, sum(a) / sum(b): of accuracy and margin b is 1 for each pair, of the
loss per token it is the row's tokens. Intervals are 95 %. They tell of the choice of pairs alone: another seed, or
another order of the data, is not in them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from evollm.errors import ConfigurationError
from evollm.hpo import AnyEvaluation, Evaluation
from evollm.hpo.fitness import FloatArray
from evollm.runs.words import Words

LEVEL = 0.95
# The 97.5th percentile of the normal distribution.
Z = 1.959963984540054
RESAMPLES = 10_000
# Of fewer rows nothing can be said at this level: even if all agree, chance does that in more than 1 of 20 cases.
FEWEST_ROWS = 6
# With fewer rows a usual gain is hard to tell from chance: of 100 pairs an accuracy is known to 10 points.
FEW_ROWS = 100
# What a pair with a margin of 0 counts.
TIE = 0.5
# Numbers drawn at a time, which bounds the memory.
_AT_A_TIME = 2**21


@dataclass(frozen=True)
class Interval:
    """A value and the 95 % interval around it; NaN where it cannot be known.

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
        """Whether it leaves open which way the difference goes; so does an interval that is not known."""
        return not (self.low > 0 or self.high < 0)


def few_rows(words: Words, *, agents: int, test: int, final: int) -> str:
    """A warning of held-out rows that are too few to show a usual gain; "" where they are enough, or none.

    Args:
        words: Those of the algorithm.
        agents: Size of the population, whose selection goes by the `test` rows.
        test: Rows that agents are evaluated on during the run.
        final: Rows of the final score that nothing is selected by.
    """
    uses = {"the selection" if agents > 1 else "the evaluations": test, "the final score": final}
    few = {use: count for use, count in uses.items() if 0 < count < FEW_ROWS}
    if not few:
        return ""
    numbers = " and ".join(f"{count} for {use}" for use, count in few.items())
    fewest = min(few.values())
    known, noun, judged = "", words.noun, words.shown[0]
    if judged.is_share:
        # At one half, where a share is known least.
        article = "An" if judged.label[:1] in "aeiou" else "A"
        known = f" {article} {judged.label} on {fewest} {noun}{'' if fewest == 1 else 's'} is known to within about "
        known += f"{100 * (wilson(TIE, fewest).high - TIE):.0f} points."
    return (
        f"Few held-out {noun}s: {numbers}.{known} To tell a gain from chance give {FEW_ROWS} or more for each: as "
        "test_data and final_data, of a gym test_dataset and final_dataset."
    )


def wilson(share: float, count: int) -> Interval:
    """Wilson's score interval of a share (Wilson 1927): it stays within [0, 1], and is not empty at 0 or 1.

    Args:
        share: Of `count`, where a tie may count half.
        count: How many were looked at, at least 1.
    """
    if not math.isfinite(share):
        return Interval(share, math.nan, math.nan)
    center = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return Interval(share, min(share, max(0.0, center - half)), max(share, min(1.0, center + half)))


def ratio_interval(numerators: FloatArray, denominators: FloatArray) -> Interval:
    """Normal interval of sum(numerators) / sum(denominators), by linearisation; with denominators of 1 that of a mean.

    Args:
        numerators: (n,) one for each row.
        denominators: (n,) above 0.

    Returns:
        NaN bounds for fewer than two rows.
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
    """A score of an evaluation with its interval: Wilson's for the accuracy, else the normal one.

    Args:
        evaluation: What was scored, pair by pair.
        score: `accuracy`, `mean_margin` or `loss`.

    Raises:
        ConfigurationError: The evaluation has no such score.
    """
    numerators, denominators = _parts(evaluation, score)
    if score == "accuracy":
        share = float(numerators.mean())
        # Where every pair ties, as all do of an untuned model, so would any others.
        ties = bool((numerators == TIE).all())
        return Interval(share, share, share) if ties else wilson(share, len(numerators))
    return ratio_interval(numerators, denominators)


def paired_difference(
    first: AnyEvaluation, second: AnyEvaluation, score: str, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """First minus second with a paired bootstrap interval (percentiles; Efron 1979).

    Rows are drawn with replacement, the same ones for both: what makes a pair hard for both agents cancels out. Where
    all rows have the same difference the interval has no width. Of fewer than 6 rows there is none: its ends are NaN.

    Args:
        first: What was scored, pair by pair.
        second: Another agent on the same pairs.
        score: `accuracy`, `mean_margin` or `loss`.
        resamples: How often to draw.
        seed: Of the draws.

    Raises:
        ConfigurationError: The two are not of the same kind or number of pairs.
    """
    if type(first) is not type(second):
        raise ConfigurationError("second", type(second).__name__, f"must be of the kind of {type(first).__name__}")
    (numerators, denominators), (others, _) = _parts(first, score), _parts(second, score)
    if len(numerators) != len(others):
        raise ConfigurationError("second", len(others), f"must hold the same {len(numerators)} rows as first")
    with np.errstate(invalid="ignore"):
        differences = numerators - others
    value = float(differences.sum() / denominators.sum())
    if not math.isfinite(value) or len(differences) < FEWEST_ROWS:
        return Interval(value, math.nan, math.nan)
    rng, count = np.random.default_rng(seed), len(differences)
    found: list[FloatArray] = []
    rows = max(1, _AT_A_TIME // count)
    for start in range(0, resamples, rows):
        drawn = rng.integers(count, size=(min(rows, resamples - start), count))
        found.append(differences[drawn].sum(axis=1) / denominators[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(found), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def _parts(evaluation: AnyEvaluation, score: str) -> tuple[FloatArray, FloatArray]:
    """(n,) and (n,): the sums whose ratio is the score."""
    if isinstance(evaluation, Evaluation) and score in ("accuracy", "mean_margin"):
        margins = evaluation.margins
        return np.heaviside(margins, TIE) if score == "accuracy" else margins, np.ones(len(margins))
    if not isinstance(evaluation, Evaluation) and score == "loss":
        return -evaluation.logprobs, evaluation.num_tokens
    raise ConfigurationError("score", score, f"is no score of a {type(evaluation).__name__}")
