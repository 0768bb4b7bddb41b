"""Population based bandits, PB2 (Parker-Holder et al. 2020, arXiv 2002.02518).

As in population based training children of the best members replace the worst ones. What differs is how their numbers
are chosen: a Gaussian process predicts from all intervals so far by how much the fitness rises with which
hyperparameters, and the child gets those with the largest upper confidence bound. Earlier intervals count less.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evollm.checks import finite_number, whole_number
from evollm.errors import ConfigurationError, MissingExtraError
from evollm.hpo.fitness import is_finite
from evollm.hpo.guards import BROKEN
from evollm.hpo.hyperparameters import Value
from evollm.hpo.population_based_training import explore, quantiles, replace_members
from evollm.hpo.search import (
    Result,
    SearchPlan,
    SearchStart,
    best_first,
    generator_of,
    reading_state,
    require_config,
)

# Points among which the largest upper confidence bound is looked for.
_CANDIDATES = 1000
# With this length scale a kernel does not depend on a coordinate.
_FAR = 1e6


@dataclass
class PB2:
    """Population based bandits as an `evollm.hpo.Search`: no agent is ever equal to another. Needs the extra `pb2`.

    The process is fitted to the change of the first component of the fitness over an interval. Before the second
    decision there is no change yet, and children are perturbed as in population based training. Categorical
    hyperparameters are drawn anew.

    Args:
        quantile_fraction: Share of the members that is replaced, and share that has children; at least one member each
            in a population of two or more. Diverged members are always replaced.
        rand_seed: Seed of the random draws.

    Raises:
        ConfigurationError: `quantile_fraction` is not above 0 and at most 0.5, or the seed is not an integer of at
            least 0.
        MissingExtraError: scikit-learn is not installed.
    """

    quantile_fraction: float = 0.25
    rand_seed: int = 42

    def __post_init__(self) -> None:
        self.quantile_fraction = finite_number("quantile_fraction", self.quantile_fraction)
        self.rand_seed = whole_number("rand_seed", self.rand_seed, 0)
        if not 0 < self.quantile_fraction <= 0.5:  # noqa: PLR2004
            raise ConfigurationError("quantile_fraction", self.quantile_fraction, "must be above 0 and at most 0.5")
        _gaussian_process()

    def start(self, start: SearchStart) -> SearchPlan:
        """Begin with the founders, unchanged.

        Raises:
            ConfigurationError: No hyperparameter may change.
        """
        self._config = require_config(start.hp_config, "a child has nothing to change")
        self._numbers = [name for name in sorted(self._config) if self._config[name].choices is None]
        self._interval, self._decisions = start.interval, 0
        self._next_index = start.next_index
        # The fitness with which a member began the interval, by index.
        self._began: dict[int, float] = {}
        # For each member and interval: the decision at its end, the numbers as fractions, the change of the fitness.
        self._observed: list[list[float]] = []
        self._rng = np.random.default_rng(self.rand_seed)
        return SearchPlan(tuple(start.founders), self._interval)

    def tell(self, results: Sequence[Result]) -> SearchPlan:
        """Replace the worst members by children of the best; the others are kept.

        Raises:
            DivergedError: No member has a finite fitness.
        """
        best = best_first(results)[0]
        self._decisions += 1
        for result in results:
            # The score of an agent that breaks a guard is a mark, and no number to model.
            scored = result.index in self._began and BROKEN not in (result.fitness[0], self._began[result.index])
            if is_finite(result.fitness) and scored:
                change = result.fitness[0] - self._began[result.index]
                self._observed.append([self._decisions, *self._fractions(result.hyperparameters), change])
        parents, leaving = quantiles(results, self.quantile_fraction)
        births = [result.kept(elite=result is best) for result in results if result.index not in leaving]
        # What the children before this one are expected to bring, so that two children are not the same.
        expected: list[list[float]] = []

        def propose(values: Mapping[str, Value]) -> dict[str, Value]:
            changed = explore(values, self._config, 0.0, self._rng)
            if not self._observed or not self._numbers:
                return changed
            drawn = {name: self._config[name].sample(self._rng) for name in sorted(self._config)}
            expected.append(self._propose(expected))
            fractions = expected[-1][1:-1]
            return drawn | {
                name: self._config[name].at(one) for name, one in zip(self._numbers, fractions, strict=True)
            }

        self._next_index = replace_members(births, results, leaving, parents, propose, self._next_index, self._rng)
        fitnesses = {result.index: result.fitness[0] for result in results}
        self._began = {birth.index: fitnesses[birth.parent] for birth in births if birth.parent is not None}
        return SearchPlan(tuple(births), self._interval)

    def _fractions(self, values: Mapping[str, Value]) -> list[float]:
        """The numbers as fractions of their ranges, on a logarithmic scale."""
        return [self._config[name].fraction_of(float(values[name])) for name in self._numbers]

    def _propose(self, expected: Sequence[Sequence[float]]) -> list[float]:
        """The numbers with the largest upper confidence bound in the next interval, as an observation that is expected.

        Args:
            expected: Such observations of the children before (batches of Desautels et al. 2014).
        """
        process = _fitted(np.array(self._observed), np.array(expected).reshape(len(expected), len(self._numbers) + 2))
        candidates = self._rng.random((_CANDIDATES, len(self._numbers)))
        points = np.column_stack([np.full(_CANDIDATES, self._decisions + 1.0), candidates])
        mean, deviation = process(points)
        # The exploration of the authors' code: it grows with the number of observations.
        exploration = math.sqrt(0.2 + max(0.0, math.log(0.4 * (len(self._observed) + len(expected)))))
        best = int(np.argmax(mean + exploration * deviation))
        return [*points[best].tolist(), float(mean[best])]

    def state_dict(self) -> dict[str, Any]:
        """The observations, the fitnesses that members began with, the counters and the generator's state."""
        return {
            "next_index": self._next_index,
            "decisions": self._decisions,
            "began": {str(index): fitness for index, fitness in self._began.items()},
            "observed": [list(row) for row in self._observed],
            "rng": self._rng.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state of `state_dict`.

        Raises:
            CheckpointError: `state` is not such a state; the search is unchanged then.
        """
        with reading_state():
            next_index, decisions = int(state["next_index"]), int(state["decisions"])
            began = {int(index): float(fitness) for index, fitness in state["began"].items()}
            observed = [[float(number) for number in row] for row in state["observed"]]
            rng = generator_of(state["rng"])
        self._next_index, self._decisions, self._began = next_index, decisions, began
        self._observed, self._rng = observed, rng


def _gaussian_process() -> Any:
    """The module of scikit-learn.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        from sklearn import gaussian_process  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "pb2", "search='pb2'") from error
    return gaussian_process


def _fitted(observed: NDArray[np.float64], expected: NDArray[np.float64]) -> Any:
    """A function from points to the predicted means and standard deviations of the change.

    The kernel is that of the paper: a squared exponential of the hyperparameters times (1 - w) ** (|t - t'| / 2) of the
    intervals, which is a Matern kernel of order 1/2. Its scales have the largest likelihood of the observations.

    Args:
        observed: (n, d + 2) rows of interval, d fractions and change.
        expected: (m, d + 2) rows that add certainty but do not move the scales.
    """
    module = _gaussian_process()
    kernels, dimensions = module.kernels, observed.shape[1] - 2
    shift, scale = observed[:, -1].mean(), observed[:, -1].std() or 1.0
    alike = kernels.RBF([_FAR] + [0.5] * dimensions, [(_FAR, _FAR)] + [(0.05, 5.0)] * dimensions)
    recent = kernels.Matern([10.0] + [_FAR] * dimensions, [(0.5, 1e3)] + [(_FAR, _FAR)] * dimensions, nu=0.5)
    kernel = alike * recent + kernels.WhiteKernel(0.1, (1e-3, 2.0))
    with warnings.catch_warnings():
        # Scales at their bounds are what few observations give.
        warnings.simplefilter("ignore")
        process = module.GaussianProcessRegressor(kernel).fit(observed[:, :-1], (observed[:, -1] - shift) / scale)
        rows = np.concatenate([observed, expected])
        process = module.GaussianProcessRegressor(process.kernel_, optimizer=None)
        process.fit(rows[:, :-1], (rows[:, -1] - shift) / scale)

    def predict(points: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        mean, deviation = process.predict(points, return_std=True)
        return mean * scale + shift, deviation * scale

    return predict
