"""Population based training with truncation selection (Jaderberg et al. 2017, arXiv 1711.09846).

After every interval the worst members are replaced by children of the best ones. A child has its parent's weights and
optimizer state, and all its hyperparameters change: each is perturbed by a factor or drawn anew.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evollm.checks import finite_number, whole_number
from evollm.errors import ConfigurationError
from evollm.hpo.fitness import is_finite, rank
from evollm.hpo.hyperparameters import HyperparameterConfig, Value
from evollm.hpo.lineage import Birth
from evollm.hpo.search import (
    Result,
    SearchPlan,
    SearchStart,
    best_first,
    distinct_child,
    generator_of,
    reading_state,
    require_config,
)


@dataclass
class PopulationBasedTraining:
    """Population based training as an `evollm.hpo.Search`: no agent is ever equal to another.

    Args:
        quantile_fraction: Share of the members that is replaced, and share that has children; at least one member each
            in a population of two or more. Diverged members are always replaced.
        resample_probability: Probability that a hyperparameter is drawn anew within its bounds instead of perturbed.
        rand_seed: Seed of the random draws.

    Raises:
        ConfigurationError: `quantile_fraction` is not above 0 and at most 0.5, `resample_probability` is not from 0 to
            1, or the seed is not an integer of at least 0.
    """

    quantile_fraction: float = 0.25
    resample_probability: float = 0.25
    rand_seed: int = 42

    def __post_init__(self) -> None:
        self.quantile_fraction = finite_number("quantile_fraction", self.quantile_fraction)
        self.resample_probability = finite_number("resample_probability", self.resample_probability)
        self.rand_seed = whole_number("rand_seed", self.rand_seed, 0)
        if not 0 < self.quantile_fraction <= 0.5:  # noqa: PLR2004
            raise ConfigurationError("quantile_fraction", self.quantile_fraction, "must be above 0 and at most 0.5")
        if not 0 <= self.resample_probability <= 1:
            raise ConfigurationError("resample_probability", self.resample_probability, "must be from 0 to 1")

    def start(self, start: SearchStart) -> SearchPlan:
        """Begin with the founders, unchanged.

        Raises:
            ConfigurationError: No hyperparameter may change.
        """
        self._config = require_config(start.hp_config, "a child has nothing to change")
        self._interval = start.interval
        self._next_index = start.next_index
        self._rng = np.random.default_rng(self.rand_seed)
        return SearchPlan(tuple(start.founders), self._interval)

    def tell(self, results: Sequence[Result]) -> SearchPlan:
        """Replace the worst members by children of the best; the others are kept.

        Raises:
            DivergedError: No member has a finite fitness.
        """
        best = best_first(results)[0]
        parents, leaving = quantiles(results, self.quantile_fraction)
        births = [result.kept(elite=result is best) for result in results if result.index not in leaving]
        self._next_index = replace_members(
            births, results, leaving, parents, self._explore, self._next_index, self._rng
        )
        return SearchPlan(tuple(births), self._interval)

    def _explore(self, values: Mapping[str, Value]) -> dict[str, Value]:
        return explore(values, self._config, self.resample_probability, self._rng)

    def state_dict(self) -> dict[str, Any]:
        """The next index and the generator's state."""
        return {"next_index": self._next_index, "rng": self._rng.bit_generator.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state of `state_dict`.

        Raises:
            CheckpointError: `state` is not such a state; the search is unchanged then.
        """
        with reading_state():
            self._next_index, self._rng = int(state["next_index"]), generator_of(state["rng"])


def quantiles(results: Sequence[Result], fraction: float) -> tuple[list[Result], set[int]]:
    """The members that have children, the best first, and the indices of the members to replace.

    Args:
        results: The results of the members, at least one with a finite fitness.
        fraction: Share of the members in each of the two groups, at most 0.5.
    """
    count = max(int(len(results) * fraction), 1 if len(results) > 1 else 0)
    ranked = [results[place] for place in rank([result.fitness for result in results])]
    finite = [result for result in ranked if is_finite(result.fitness)]
    worst = {result.index for result in ranked[len(ranked) - count :]}
    diverged = {result.index for result in results if not is_finite(result.fitness)}
    return finite[: max(1, count)], worst | diverged


def replace_members(
    births: list[Birth],
    results: Sequence[Result],
    leaving: Collection[int],
    parents: Sequence[Result],
    propose: Callable[[Mapping[str, Value]], dict[str, Value]],
    next_index: int,
    rng: np.random.Generator,
) -> int:
    """Add a child of a drawn parent for each member that leaves; the member itself if no child can differ.

    Args:
        births: The births so far, which grow.
        results: The results of all members.
        leaving: Indices of the members to replace; diverged ones leave in any case.
        parents: Members that have children, all equally likely.
        propose: Draws the hyperparameters of a child from those of its parent.
        next_index: Index of the first child.
        rng: Consumed by one draw for each member that leaves.

    Returns:
        The next index.
    """
    for member in (result for result in results if result.index in leaving):
        parent = parents[int(rng.integers(len(parents)))]
        child = distinct_child(parent, next_index, births, results, propose)
        if child is not None:
            births.append(child)
        elif is_finite(member.fitness):
            births.append(member.kept())
        next_index += 1
    return next_index


def explore(
    values: Mapping[str, Value], config: HyperparameterConfig, resample_probability: float, rng: np.random.Generator
) -> dict[str, Value]:
    """Draw another value of each hyperparameter of a config.

    Args:
        values: The hyperparameters to begin with.
        config: The hyperparameters that change.
        resample_probability: Probability that one is drawn anew; otherwise it is perturbed (`RLParameter.mutate`).
        rng: Consumed by three draws for each hyperparameter, whatever is drawn.
    """
    changed: dict[str, Value] = {}
    for name in sorted(config):
        resamples = rng.random() < resample_probability
        drawn, (perturbed, _) = config[name].sample(rng), config[name].mutate(values[name], rng)
        changed[name] = drawn if resamples else perturbed
    return changed
