"""Guards: bounds on how far an agent may drift from the reference, which come before the fitness.

Agents are compared as in Deb (2000), "An efficient constraint handling method for genetic algorithms": an agent that
holds all bounds beats one that does not, of two that do not the one nearer to its bounds is better, and among those
that hold them the fitness decides. A bound therefore never trades off against the score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from evollm.checks import finite_number
from evollm.errors import ConfigurationError
from evollm.hpo.fitness import Evaluation, Fitness, FloatArray
from evollm.names import check_known

# The first component of the fitness of an agent that breaks a guard: below every score, and finite, since a fitness
# that is not finite means that the agent has diverged.
BROKEN = -1e9


@dataclass(frozen=True)
class Guards:
    """Bounds on an agent's log-probs of the held-out pairs; None: no such bound.

    Attributes:
        min_chosen_logratio: Smallest mean over the pairs of log pi(chosen) - log ref(chosen), in nats per completion.
            Its negative is what the chosen completions have become more expensive by, in cross-entropy.
        max_kl: Largest mean over the pairs of `Evaluation.kl`, the exact KL(pi || ref) along the held-out completions,
            in nats per completion. Measuring it makes an evaluation two to three times as expensive.

    Raises:
        ConfigurationError: A bound is no finite number.
    """

    min_chosen_logratio: float | None = None
    max_kl: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) is not None:
                object.__setattr__(self, field.name, finite_number(f"guards.{field.name}", getattr(self, field.name)))

    @property
    def measurements(self) -> dict[str, bool]:
        """Keyword arguments of `Executor.evaluate` that the bounds need; without `max_kl` none, so that any will do."""
        return {} if self.max_kl is None else {"kl": True}

    def excess(self, evaluation: Evaluation) -> float:
        """How far an agent is beyond its bounds: the sum of its excesses, each divided by the size of the bound.

        Returns:
            0 if all bounds hold, NaN if a measurement is not finite.
        """
        total = 0.0
        for bound, drift in self._measured(evaluation):
            total += math.nan if math.isnan(drift) else max(0.0, drift - bound) / (abs(bound) or 1.0)
        return total

    def _measured(self, evaluation: Evaluation) -> list[tuple[float, float]]:
        """Upper bounds that are set, each with what must not exceed it."""
        found = []
        if self.min_chosen_logratio is not None:
            found.append((-self.min_chosen_logratio, -_mean(evaluation.chosen_logratios)))
        if self.max_kl is not None:
            found.append((self.max_kl, math.nan if evaluation.kl is None else _mean(evaluation.kl)))
        return found

    def guarded(self, fitness: Fitness, evaluation: Evaluation) -> Fitness:
        """Return the fitness itself if all bounds hold, else one below it: (-1e9, minus the excess, *fitness)."""
        excess = self.excess(evaluation)
        return fitness if excess == 0 else (BROKEN, -excess, *fitness)

    def to_dict(self) -> dict[str, float]:
        """Return the bounds that are set, by name."""
        return {name: bound for name, bound in asdict(self).items() if bound is not None}


def _mean(values: FloatArray) -> float:
    """The mean, NaN if a value is not finite."""
    return float(values.mean()) if np.isfinite(values).all() else math.nan


def guards_of(value: object) -> Guards:
    """Return `value`, or the guards of a mapping such as `{"min_chosen_logratio": -3.0}`.

    Raises:
        ConfigurationError: It is something else; an unknown name gets the nearest.
    """
    if isinstance(value, Guards):
        return value
    if not isinstance(value, Mapping):
        raise ConfigurationError("guards", value, "must be a mapping such as {'min_chosen_logratio': -3.0}")
    bounds: Mapping[str, Any] = value
    check_known(bounds, [field.name for field in fields(Guards)], {}, "guards")
    return Guards(**bounds)
