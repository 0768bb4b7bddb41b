"""Fitness functions by name, with the contribution of each held-out row, so that two agents can be compared in pairs.

Scores of preference pairs are functions of the margins m alone, in nats. All but `mean_margin` are scale-free: they are
the same for c m with any c > 0, so neither beta nor a mere stretch of all log-ratios raises them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from evollm.checks import nearest_name
from evollm.errors import ConfigurationError
from evollm.hpo.fitness import (
    TIE,
    AnyEvaluation,
    Evaluation,
    Fitness,
    FloatArray,
    LikelihoodEvaluation,
    RewardEvaluation,
    UnpairedEvaluation,
)

# Bound of |mean / std|, which is infinite for equal margins.
MOST_STDS = 1e6
# Bound of t in units of 1 / rms(m): where every margin is positive, the loss falls for ever as t grows. At this bound
# the typical pair has odds of e^10, far more than some hundreds of pairs can show.
MOST_TEMPERATURE = 10.0
FOLDS = 10
# Halvings of the interval of t, which leave less than the rounding of float64.
_BISECTIONS = 56


def margin_over_std(margins: FloatArray) -> float:
    """Mean of the margins divided by their population standard deviation.

    Args:
        margins: (n,) n >= 1.

    Returns:
        The score, at most 1e6 in size: that is the score of equal margins, with their sign. 0 if the mean is 0, NaN if
        a margin is not finite.
    """
    if not np.isfinite(margins).all():
        return math.nan
    unit = _divided_by_largest(margins)
    mean, std = float(unit.mean()), float(unit.std())
    if abs(mean) >= MOST_STDS * std:
        return math.copysign(MOST_STDS, mean) if mean else 0.0
    return mean / std


def margin_over_std_terms(margins: FloatArray) -> FloatArray:
    """Contribution of each pair to `margin_over_std`: the score plus the pair's influence on it.

    With z = (m - mean) / std and the score s, the influence is z - s (z^2 - 1) / 2 (Hampel 1974, "The influence curve
    and its role in robust estimation"). Its mean is 0, so the mean of the terms is the score, and their standard error
    is that of the score to first order, the noise of the standard deviation included.

    Args:
        margins: (n,).

    Returns:
        (n,).
    """
    score = margin_over_std(margins)
    if not abs(score) < MOST_STDS or not margins.any():
        return np.full(len(margins), score)
    unit = _divided_by_largest(margins)
    z = (unit - unit.mean()) / unit.std()
    return np.asarray(score + z - score / 2 * (np.square(z) - 1))


def best_temperature(margins: FloatArray) -> float:
    """The t in [0, 10 / rms(m)] with the smallest mean log(1 + exp(-t m)), which is convex in t.

    Args:
        margins: (n,) finite; n may be 0.

    Returns:
        t, in 1 / nats: 0 if the mean margin is not positive, the upper bound if no pair is ranked wrongly.
    """
    rms = math.sqrt(np.square(margins).mean()) if len(margins) else 0.0
    if rms == 0:
        return 0.0
    unit = margins / rms

    def falls_at(t: float) -> bool:
        # The derivative is -mean(m sigmoid(-t m)), and log sigmoid(-x) = -log(1 + exp(x)).
        return float((unit * np.exp(-np.logaddexp(0.0, t * unit))).mean()) > 0

    low, high = 0.0, MOST_TEMPERATURE
    if falls_at(high):
        return high / rms
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if falls_at(middle) else (low, middle)
    return low / rms


def log_loss_terms(margins: FloatArray, folds: int = FOLDS) -> FloatArray:
    """Log-loss of each pair, log(1 + exp(-t m)), with t the `best_temperature` of the other folds' pairs.

    Pair i is in fold i mod `folds`, whatever the number of pairs, so that growing subsets keep their folds. A mean of
    log 2 is that of an agent whose margins say nothing. An agent whose margins are large and wrong for some folds can
    have more.

    Args:
        margins: (n,) n >= 1.
        folds: Number of folds; with fewer pairs each pair is a fold. A single pair has t = 0.

    Returns:
        (n,) in nats; NaN if a margin is not finite.
    """
    terms = np.full(len(margins), math.nan)
    if not np.isfinite(margins).all():
        return terms
    unit = _divided_by_largest(margins)
    fold = np.arange(len(unit)) % folds
    for number in range(min(folds, len(unit))):
        held_out = fold == number
        terms[held_out] = np.logaddexp(0.0, -best_temperature(unit[~held_out]) * unit[held_out])
    return terms


def scale_free_log_loss(margins: FloatArray, folds: int = FOLDS) -> float:
    """Mean of `log_loss_terms`, in nats per pair: smaller is better, and log 2 = 0.693 is chance."""
    return float(log_loss_terms(margins, folds).mean())


def _divided_by_largest(margins: FloatArray) -> FloatArray:
    """The margins divided by the largest |margin|, so that squares neither overflow nor underflow; zeros stay zeros."""
    largest = np.abs(margins).max()
    return margins / largest if largest > 0 else margins


def loss_terms(evaluation: LikelihoodEvaluation) -> FloatArray:
    """Contribution of each example to the loss per token: the loss plus the example's influence on the ratio of sums.

    Returns:
        (n,) in nats per token, with the mean `evaluation.loss`.
    """
    losses, tokens = evaluation.ratios["loss"]
    return np.asarray(evaluation.loss + (losses - evaluation.loss * tokens) / tokens.mean())


@dataclass(frozen=True)
class NamedFitness:
    """A fitness function that is known by its name.

    Attributes:
        name: The name.
        score: Maps an evaluation to the first component of the fitness; larger is better.
        terms: Maps an evaluation to (n,) contributions of its rows, whose mean is the score.
        tie_break: Maps an evaluation to the second component, which decides between equal scores; None: there is none.
    """

    name: str
    score: Callable[[Any], float]
    terms: Callable[[Any], FloatArray]
    tie_break: Callable[[Any], float] | None = None

    def __call__(self, evaluation: Any) -> Fitness:
        """Return the fitness of an evaluation."""
        first = self.score(evaluation)
        return (first,) if self.tie_break is None else (first, self.tie_break(evaluation))


def _accuracy(evaluation: Evaluation) -> float:
    return evaluation.accuracy


def _accuracy_terms(evaluation: Evaluation) -> FloatArray:
    return np.heaviside(evaluation.margins, TIE)


def _mean_margin(evaluation: Evaluation) -> float:
    return evaluation.mean_margin


def _margin_over_std(evaluation: Evaluation) -> float:
    return margin_over_std(evaluation.margins)


PREFERENCE_FITNESSES: Mapping[str, NamedFitness] = {
    one.name: one
    for one in (
        NamedFitness("accuracy", _accuracy, _accuracy_terms, _margin_over_std),
        NamedFitness("accuracy_mean_margin", _accuracy, _accuracy_terms, _mean_margin),
        NamedFitness(
            "log_loss",
            lambda evaluation: -scale_free_log_loss(evaluation.margins),
            lambda evaluation: -log_loss_terms(evaluation.margins),
            _margin_over_std,
        ),
        NamedFitness("margin_over_std", _margin_over_std, lambda evaluation: margin_over_std_terms(evaluation.margins)),
        NamedFitness("mean_margin", _mean_margin, lambda evaluation: evaluation.margins),
    )
}
"""Fitness functions of an `Evaluation` by name; where scores are equal, the last part of the text decides.

`accuracy`: the accuracy, then mean / std of the margins. `accuracy_mean_margin`: the accuracy, then the mean margin.
`log_loss`: minus `scale_free_log_loss`, then mean / std. `margin_over_std`. `mean_margin`, which is not scale-free.
"""

LIKELIHOOD_FITNESSES: Mapping[str, NamedFitness] = {
    "loss": NamedFitness("loss", lambda evaluation: -evaluation.loss, lambda evaluation: -loss_terms(evaluation))
}
"""Fitness functions of a `LikelihoodEvaluation` by name. `loss`: minus the loss per token."""


def _auc_terms(evaluation: UnpairedEvaluation) -> FloatArray:
    return evaluation.auc_terms


def _mean_unpaired_margin(evaluation: UnpairedEvaluation) -> float:
    return evaluation.mean_margin


UNPAIRED_FITNESSES: Mapping[str, NamedFitness] = {
    one.name: one
    for one in (
        NamedFitness("auc", lambda evaluation: evaluation.auc, _auc_terms, _mean_unpaired_margin),
        NamedFitness("mean_margin", _mean_unpaired_margin, lambda evaluation: evaluation.margin_terms),
    )
}
"""Fitness functions of an `UnpairedEvaluation` by name. `auc`: the AUC, then the mean margin. `mean_margin`."""

REWARD_FITNESSES: Mapping[str, NamedFitness] = {
    "reward": NamedFitness("reward", lambda evaluation: evaluation.reward, lambda evaluation: evaluation.rewards)
}
"""Fitness functions of a `RewardEvaluation` by name. `reward`: the mean reward."""

RACED: Mapping[type[AnyEvaluation], NamedFitness] = {
    Evaluation: PREFERENCE_FITNESSES["margin_over_std"],
    LikelihoodEvaluation: LIKELIHOOD_FITNESSES["loss"],
    UnpairedEvaluation: UNPAIRED_FITNESSES["auc"],
    RewardEvaluation: REWARD_FITNESSES["reward"],
}
"""The types of evaluations, each with the score that a race tests the differences of."""


def _win_rate(evaluation: AnyEvaluation) -> float:
    return evaluation.win_rate


def _win_terms(evaluation: AnyEvaluation) -> FloatArray:
    return evaluation.win_terms


def raced(evaluation: AnyEvaluation) -> NamedFitness:
    """The score of `RACED` for an evaluation."""
    return next(score for kind, score in RACED.items() if isinstance(evaluation, kind))


WIN_RATE = NamedFitness("win_rate", _win_rate, _win_terms, lambda evaluation: raced(evaluation).score(evaluation))
"""The win rate of any evaluation that has one; then its score of `RACED`."""

preference_fitness = PREFERENCE_FITNESSES["accuracy_mean_margin"]
likelihood_fitness = LIKELIHOOD_FITNESSES["loss"]


def fitness_named(name: str, known: Mapping[str, Callable[[Any], object]]) -> Callable[[Any], object]:
    """Return the fitness function with this name.

    Raises:
        ConfigurationError: There is none; the message gives the nearest name.
    """
    if name not in known:
        nearest = nearest_name(name, known)
        names = f"the nearest is {nearest!r}, known are {', '.join(known)}" if nearest else "give a function"
        raise ConfigurationError("fitness", name, f"is no fitness of this algorithm; {names}")
    return known[name]
