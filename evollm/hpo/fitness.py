"""Evaluations of agents on held-out rows, and the fitness by which agents are ranked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from evollm.errors import ConfigurationError

FloatArray: TypeAlias = NDArray[np.float64]

Fitness: TypeAlias = tuple[float, ...]
"""Compared lexicographically, larger is better; a later component only breaks ties of the earlier ones."""

# What a pair with a margin of 0 adds to the number of pairs that are ranked correctly.
TIE = 0.5


@dataclass(frozen=True, eq=False)
class RowEvaluation:
    """An evaluation whose fields are read-only float64 vectors, one number for each held-out row."""

    def __post_init__(self) -> None:
        """Copy the vectors and check their shapes."""
        names = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        for name in names:
            values = np.array(getattr(self, name), dtype=np.float64)
            values.flags.writeable = False
            object.__setattr__(self, name, values)
            if values.ndim != 1 or values.size == 0:
                raise ConfigurationError(f"{name}.shape", values.shape, "must be (n,) with n >= 1 held-out rows")
        first, *others = (getattr(self, name).shape for name in names)
        for name, shape in zip(names[1:], others, strict=True):
            if first != shape:
                fix = f"must equal {name}.shape={shape}: one number for each row"
                raise ConfigurationError(f"{names[0]}.shape", first, fix)

    def __len__(self) -> int:
        """Number of held-out rows."""
        return len(getattr(self, fields(self)[0].name))

    @property
    def win_rate(self) -> float:
        """Share of the answered prompts at which a judge prefers the policy's answer to the reference's; a tie is half.

        Raises:
            ConfigurationError: It was not measured.
        """
        rates = self._win_rates
        if rates is None:
            raise ConfigurationError("judge", None, "a win rate is measured only with one: give judge=...")
        return float(rates[np.isfinite(rates)].mean())

    @property
    def win_terms(self) -> FloatArray:
        """(n,) contribution of each row to `win_rate`, whose mean it is; a row whose prompt was not answered has it."""
        rate, rates = self.win_rate, self._win_rates
        assert rates is not None
        known = np.isfinite(rates)
        return np.where(known, rate + (np.where(known, rates, rate) - rate) * len(rates) / known.sum(), rate)

    @property
    def _win_rates(self) -> FloatArray | None:
        found: FloatArray | None = getattr(self, "win_rates", None)
        return found

    @property
    def _judged_scores(self) -> dict[str, float]:
        """The win rate by its name, if it was measured."""
        return {} if self._win_rates is None else {"win_rate": self.win_rate}

    @property
    def _judged_ratios(self) -> dict[str, tuple[FloatArray, FloatArray]]:
        """The same as a ratio of two sums over the m answered prompts."""
        if self._win_rates is None:
            return {}
        known = self._win_rates[np.isfinite(self._win_rates)]
        return {"win_rate": (known, np.ones(len(known)))}

    def equals(self, other: RowEvaluation) -> bool:
        """Say whether all numbers of two evaluations are equal; NaN equals NaN."""
        mine, theirs = ({k: v for k, v in vars(one).items() if v is not None} for one in (self, other))
        return mine.keys() == theirs.keys() and all(np.array_equal(mine[k], theirs[k], equal_nan=True) for k in mine)


@dataclass(frozen=True, eq=False)
class Evaluation(RowEvaluation):
    """Log-ratios of the current policy on n held-out pairs; they do not depend on beta.

    Attributes:
        chosen_logratios: (n,) log pi - log ref of each chosen completion, summed over its tokens, in nats.
        rejected_logratios: (n,) the same for the rejected completions.
        kl: (n,) exact KL(pi || ref) of the next token given the tokens before, summed over the scored tokens of each
            completion, and the mean over the pair's two completions, in nats per completion: the divergence at the
            prefixes of the held-out completions, not of those that the policy would sample. None: not measured.
        answer_lengths: (n,) tokens of greedy answers to the first prompts, their end included; NaN for the others, and
            None if no answers were sampled.
        reference_lengths: (n,) the same of the reference's answers.
        win_rates: (n,) how often a judge prefers the policy's answer to a prompt to the reference's, in [0, 1]; NaN for
            prompts that were not answered, and None without a judge.

    Raises:
        ConfigurationError: If there is no pair, or they are not vectors of the same length.
    """

    chosen_logratios: FloatArray
    rejected_logratios: FloatArray
    kl: FloatArray | None = None
    answer_lengths: FloatArray | None = None
    reference_lengths: FloatArray | None = None
    win_rates: FloatArray | None = None

    @property
    def margins(self) -> FloatArray:
        """(n,) log-ratio of chosen minus log-ratio of rejected, in nats."""
        with np.errstate(invalid="ignore"):  # inf - inf of a diverged agent is NaN, which needs no warning of numpy's
            return self.chosen_logratios - self.rejected_logratios

    @property
    def accuracy(self) -> float:
        """Share of pairs with a margin above 0; a tie counts half, and any NaN margin makes it NaN."""
        return float(np.heaviside(self.margins, TIE).mean())

    @property
    def mean_margin(self) -> float:
        """Mean of the margins, in nats."""
        with np.errstate(invalid="ignore"):
            return float(self.margins.mean())

    @property
    def answer_length_ratio(self) -> float:
        """Mean length of the sampled answers divided by that of the reference's; NaN if none were sampled."""
        if self.answer_lengths is None or self.reference_lengths is None:
            return math.nan
        return float(np.nanmean(self.answer_lengths) / np.nanmean(self.reference_lengths))

    @property
    def scores(self) -> dict[str, float]:
        """The reported numbers, by name."""
        return {"accuracy": self.accuracy, "mean_margin": self.mean_margin, **self._judged_scores}

    @property
    def ratios(self) -> dict[str, tuple[FloatArray, FloatArray]]:
        """Scores as ratios of two sums over the pairs: (n,) numerators and (n,) denominators, by name."""
        ones = np.ones(len(self))
        own = {"accuracy": (np.heaviside(self.margins, TIE), ones), "mean_margin": (self.margins, ones)}
        return {**own, **self._judged_ratios}


@dataclass(frozen=True, eq=False)
class LikelihoodEvaluation(RowEvaluation):
    """Log-likelihoods of the current policy on n held-out examples.

    Attributes:
        logprobs: (n,) log pi of each completion, summed over its tokens, in nats.
        num_tokens: (n,) tokens of each completion, the end-of-sequence token included.
        win_rates: As of `Evaluation`, against the base without adapter.

    Raises:
        ConfigurationError: If there is no example, or the two are not vectors of the same length.
    """

    logprobs: FloatArray
    num_tokens: FloatArray
    win_rates: FloatArray | None = None

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of a completion token, over all tokens, in nats."""
        return -float(self.logprobs.sum() / self.num_tokens.sum())

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        with np.errstate(over="ignore"):
            return float(np.exp(self.loss))

    @property
    def scores(self) -> dict[str, float]:
        """The reported numbers, by name."""
        return {"loss": self.loss, "perplexity": self.perplexity, **self._judged_scores}

    @property
    def ratios(self) -> dict[str, tuple[FloatArray, FloatArray]]:
        """Scores as ratios of two sums over the examples: (n,) numerators and (n,) denominators, by name."""
        return {"loss": (-self.logprobs, self.num_tokens), **self._judged_ratios}


@dataclass(frozen=True, eq=False)
class UnpairedEvaluation(RowEvaluation):
    """Log-ratios of the current policy on n held-out answers with labels; they do not depend on beta or weights.

    Attributes:
        logratios: (n,) log pi - log ref of each answer, summed over its tokens, in nats.
        desirable: (n,) 1 for a desirable answer, 0 for an undesirable one.
        win_rates: As of `Evaluation`.

    Raises:
        ConfigurationError: If there is no answer, the two are not vectors of the same length, or a label is neither.
    """

    logratios: FloatArray
    desirable: FloatArray
    win_rates: FloatArray | None = None

    def __post_init__(self) -> None:
        """Check the labels too."""
        super().__post_init__()
        if not np.isin(self.desirable, (0.0, 1.0)).all():
            raise ConfigurationError("desirable", self.desirable, "must be 1 for desirable answers and 0 for others")

    @property
    def auc(self) -> float:
        """Area under the ROC curve: the probability that a desirable answer has a larger log-ratio than another one.

        Ties count half (Mann-Whitney). It is 0.5 without answers of both kinds, and NaN with a NaN among log-ratios.
        """
        return float(self.auc_terms.mean())

    @property
    def auc_terms(self) -> FloatArray:
        """(n,) contribution of each answer to `auc`: the AUC plus the answer's influence on it.

        An answer's placement is the share of the answers of the other kind that it is on the right side of. The
        influence is its distance from the AUC, times n over the number of answers of its own kind: so the mean of the
        terms is the AUC, and their standard error is that of DeLong et al. (Biometrics 1988).
        """
        mine = self.desirable == 1
        if np.isnan(self.logratios).any():
            return np.full(len(self), math.nan)
        if mine.all() or not mine.any():
            return np.full(len(self), TIE)
        placements = np.empty(len(self))
        placements[mine] = _shares_below(self.logratios[~mine], self.logratios[mine])
        placements[~mine] = 1 - _shares_below(self.logratios[mine], self.logratios[~mine])
        return self._influences(placements) + float(placements[mine].mean())

    @property
    def mean_margin(self) -> float:
        """Mean log-ratio of desirable answers minus that of undesirable ones, in nats; 0 without answers of both."""
        return float(self.margin_terms.mean())

    @property
    def margin_terms(self) -> FloatArray:
        """(n,) contribution of each answer to `mean_margin`: the margin plus the answer's influence on it."""
        mine = self.desirable == 1
        if mine.all() or not mine.any():
            return np.zeros(len(self))
        with np.errstate(invalid="ignore"):
            margin = float(self.logratios[mine].mean() - self.logratios[~mine].mean())
            return self._influences(np.where(mine, self.logratios, -self.logratios)) + margin

    def _influences(self, values: FloatArray) -> FloatArray:
        """(n,) distances from the mean of the answers of the same kind, times n over their number."""
        found = np.empty(len(self))
        for kind in (self.desirable == 1, self.desirable == 0):
            found[kind] = (values[kind] - values[kind].mean()) * len(self) / kind.sum()
        return found

    @property
    def scores(self) -> dict[str, float]:
        """The reported numbers, by name."""
        return {"auc": self.auc, "mean_margin": self.mean_margin, **self._judged_scores}

    @property
    def ratios(self) -> dict[str, tuple[FloatArray, FloatArray]]:
        """Scores as ratios of two sums over the answers: (n,) numerators and (n,) denominators, by name."""
        ones = np.ones(len(self))
        return {"auc": (self.auc_terms, ones), "mean_margin": (self.margin_terms, ones), **self._judged_ratios}


def _shares_below(values: FloatArray, of: FloatArray) -> FloatArray:
    """For each number of `of` the share of `values` below it; equal ones count half."""
    ordered = np.sort(values)
    return (np.searchsorted(ordered, of, "left") + np.searchsorted(ordered, of, "right")) / (2 * len(values))


@dataclass(frozen=True, eq=False)
class RewardEvaluation(RowEvaluation):
    """Rewards of the current policy's answers to n held-out prompts.

    Attributes:
        rewards: (n,) mean reward of the answers to each prompt.
        lengths: (n,) mean number of tokens of these answers, their end included.
        win_rates: As of `Evaluation`.

    Raises:
        ConfigurationError: If there is no prompt, or they are not vectors of the same length.
    """

    rewards: FloatArray
    lengths: FloatArray
    win_rates: FloatArray | None = None

    @property
    def reward(self) -> float:
        """Mean reward; NaN if one is NaN."""
        with np.errstate(invalid="ignore"):  # inf - inf
            return float(self.rewards.mean())

    @property
    def mean_length(self) -> float:
        """Mean number of tokens of an answer."""
        return float(self.lengths.mean())

    @property
    def scores(self) -> dict[str, float]:
        """The reported numbers, by name."""
        return {"reward": self.reward, "mean_length": self.mean_length, **self._judged_scores}

    @property
    def ratios(self) -> dict[str, tuple[FloatArray, FloatArray]]:
        """Scores as ratios of two sums over the prompts: (n,) numerators and (n,) denominators, by name."""
        ones = np.ones(len(self))
        return {"reward": (self.rewards, ones), "mean_length": (self.lengths, ones), **self._judged_ratios}


AnyEvaluation: TypeAlias = Evaluation | LikelihoodEvaluation | UnpairedEvaluation | RewardEvaluation


def as_fitness(value: object) -> Fitness:
    """Turn the value that a user's fitness callable returned into a `Fitness`.

    Args:
        value: A number, a numpy scalar, an array or tensor without dimensions, or a tuple of these.

    Raises:
        ConfigurationError: If the value is anything else, or an empty tuple.
    """
    components = value if isinstance(value, tuple) else (value,)
    scalars = [component.item() if getattr(component, "ndim", None) == 0 else component for component in components]
    if not scalars or any(isinstance(scalar, bool) or not isinstance(scalar, Real) for scalar in scalars):
        raise ConfigurationError("fitness", value, "must be a number or a tuple of numbers; larger is better")
    return tuple(float(scalar) for scalar in scalars)


def is_finite(fitness: Fitness) -> bool:
    """Say whether every component is finite."""
    return all(math.isfinite(component) for component in fitness)


def rank(fitnesses: Sequence[Fitness]) -> list[int]:
    """Return the positions in `fitnesses` from the best to the worst.

    Any fitness with a component that is not finite, +inf included, comes after all finite ones. Among equals the lower
    position comes first.
    """

    def key(position: int) -> tuple[bool, Fitness]:
        fitness = fitnesses[position]
        return (True, fitness) if is_finite(fitness) else (False, ())

    return sorted(range(len(fitnesses)), key=key, reverse=True)
