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
class _PerRow:
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

    def equals(self, other: _PerRow) -> bool:
        """Say whether all numbers of two evaluations are equal; NaN equals NaN."""
        mine, theirs = ({k: v for k, v in vars(one).items() if v is not None} for one in (self, other))
        return mine.keys() == theirs.keys() and all(np.array_equal(mine[k], theirs[k], equal_nan=True) for k in mine)


@dataclass(frozen=True, eq=False)
class Evaluation(_PerRow):
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

    Raises:
        ConfigurationError: If there is no pair, or they are not vectors of the same length.
    """

    chosen_logratios: FloatArray
    rejected_logratios: FloatArray
    kl: FloatArray | None = None
    answer_lengths: FloatArray | None = None
    reference_lengths: FloatArray | None = None

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
        return {"accuracy": self.accuracy, "mean_margin": self.mean_margin}

    @property
    def ratios(self) -> dict[str, tuple[FloatArray, FloatArray]]:
        """Scores as ratios of two sums over the pairs: (n,) numerators and (n,) denominators, by name."""
        ones = np.ones(len(self))
        return {"accuracy": (np.heaviside(self.margins, TIE), ones), "mean_margin": (self.margins, ones)}


@dataclass(frozen=True, eq=False)
class LikelihoodEvaluation(_PerRow):
    """Log-likelihoods of the current policy on n held-out examples.

    Attributes:
        logprobs: (n,) log pi of each completion, summed over its tokens, in nats.
        num_tokens: (n,) tokens of each completion, the end-of-sequence token included.

    Raises:
        ConfigurationError: If there is no example, or the two are not vectors of the same length.
    """

    logprobs: FloatArray
    num_tokens: FloatArray

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
        return {"loss": self.loss, "perplexity": self.perplexity}

    @property
    def ratios(self) -> dict[str, tuple[FloatArray, FloatArray]]:
        """Scores as ratios of two sums over the examples: (n,) numerators and (n,) denominators, by name."""
        return {"loss": (-self.logprobs, self.num_tokens)}


AnyEvaluation: TypeAlias = Evaluation | LikelihoodEvaluation


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
