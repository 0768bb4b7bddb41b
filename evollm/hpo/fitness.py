"""How good an agent is, measured without anything that evolution may change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from evollm.errors import ConfigurationError

FloatArray: TypeAlias = NDArray[np.float64]

Fitness: TypeAlias = tuple[float, ...]
"""Compared lexicographically, larger is better; a later component only breaks ties of the earlier ones."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What the current policy makes of n held-out pairs; free of beta.

    Attributes:
        chosen_logratios: (n,) log pi - log ref of each chosen completion, summed over its tokens, in nats.
        rejected_logratios: (n,) the same for the rejected completions.

    Raises:
        ConfigurationError: If there is no pair, or the two are not vectors of the same length.
    """

    chosen_logratios: FloatArray
    rejected_logratios: FloatArray

    def __post_init__(self) -> None:
        """Take read-only float64 copies and check their shapes."""
        _take_vectors(self, "chosen_logratios", "rejected_logratios")

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.chosen_logratios)

    @property
    def margins(self) -> FloatArray:
        """(n,) log-ratio of chosen minus log-ratio of rejected, in nats."""
        with np.errstate(invalid="ignore"):  # inf - inf of a diverged agent: the NaN itself is the message
            return self.chosen_logratios - self.rejected_logratios

    @property
    def accuracy(self) -> float:
        """Share of pairs with a margin above 0; a tie counts half, and any NaN margin makes it NaN."""
        return float(np.heaviside(self.margins, 0.5).mean())

    @property
    def mean_margin(self) -> float:
        """Mean of the margins, in nats."""
        with np.errstate(invalid="ignore"):
            return float(self.margins.mean())

    @property
    def scores(self) -> dict[str, float]:
        """What is reported of it, by name."""
        return {"accuracy": self.accuracy, "mean_margin": self.mean_margin}


@dataclass(frozen=True, eq=False)
class LikelihoodEvaluation:
    """What the current policy makes of n held-out examples.

    Attributes:
        logprobs: (n,) log pi of each completion, summed over its tokens, in nats.
        num_tokens: (n,) tokens of each completion, with what ends it.

    Raises:
        ConfigurationError: If there is no example, or the two are not vectors of the same length.
    """

    logprobs: FloatArray
    num_tokens: FloatArray

    def __post_init__(self) -> None:
        """Take read-only float64 copies and check their shapes."""
        _take_vectors(self, "logprobs", "num_tokens")

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.logprobs)

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
        """What is reported of it, by name."""
        return {"loss": self.loss, "perplexity": self.perplexity}


AnyEvaluation: TypeAlias = Evaluation | LikelihoodEvaluation


def _take_vectors(evaluation: object, first: str, second: str) -> None:
    """Make two fields of an evaluation read-only float64 vectors of the same length."""
    for field in (first, second):
        values = np.array(getattr(evaluation, field), dtype=np.float64)
        values.flags.writeable = False
        object.__setattr__(evaluation, field, values)
        if values.ndim != 1 or values.size == 0:
            raise ConfigurationError(f"{field}.shape", values.shape, "must be (n,) with n >= 1 held-out rows")
    shapes = [getattr(evaluation, field).shape for field in (first, second)]
    if shapes[0] != shapes[1]:
        raise ConfigurationError(
            f"{first}.shape", shapes[0], f"must equal {second}.shape={shapes[1]}: one for each row"
        )


def likelihood_fitness(evaluation: LikelihoodEvaluation) -> Fitness:
    """Return (minus the loss,): the default fitness of SFT. It contains nothing that evolution changes."""
    return (-evaluation.loss,)


def preference_fitness(evaluation: Evaluation) -> Fitness:
    """Return (accuracy, mean margin): the default fitness, in which the margin only breaks ties of the accuracy."""
    return evaluation.accuracy, evaluation.mean_margin


def as_fitness(value: object) -> Fitness:
    """Turn what a user's fitness callable returned into a `Fitness`.

    Args:
        value: A number, a numpy scalar, an array or tensor without dimensions, or a tuple of these.

    Raises:
        ConfigurationError: If it is anything else, or an empty tuple.
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
