"""Asynchronous successive halving, ASHA (Li et al. 2018, arXiv 1810.05934).

A member reaches a rung after `evo_steps`, then `reduction_factor` times, `reduction_factor` ** 2 times ... as many
steps. It goes on if it belongs to the best 1 / `reduction_factor` of all agents that have reached the rung so far.
Otherwise it leaves, and an agent with newly drawn hyperparameters begins afresh in its place. In the paper an agent
that does not go on waits and may be promoted later; here it is stopped for good, so that no weights are kept for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evollm.checks import optional_whole_number, whole_number
from evollm.errors import ConfigurationError
from evollm.hpo.fitness import Fitness, is_finite, rank
from evollm.hpo.lineage import Birth
from evollm.hpo.search import (
    MAX_DRAWS,
    Result,
    SearchPlan,
    SearchStart,
    best_first,
    generator_of,
    reading_state,
    require_config,
)


@dataclass
class ASHA:
    """Asynchronous successive halving as an `evollm.hpo.Search`.

    Args:
        reduction_factor: The eta of the paper, at least 2.
        max_agents: Most agents of the whole run, the founders included; then places stay empty, which saves their
            steps. None: an agent begins in every place that becomes free, also shortly before the end.
        rand_seed: Seed of the random draws.

    Raises:
        ConfigurationError: A number is too small or not an integer.
    """

    reduction_factor: int = 2
    max_agents: int | None = None
    rand_seed: int = 42

    def __post_init__(self) -> None:
        self.reduction_factor = whole_number("reduction_factor", self.reduction_factor, 2)
        self.max_agents = optional_whole_number("max_agents", self.max_agents, 1)
        self.rand_seed = whole_number("rand_seed", self.rand_seed, 0)

    def start(self, start: SearchStart) -> SearchPlan:
        """Begin with the founders, unchanged.

        Raises:
            ConfigurationError: No hyperparameter may change, or there are more founders than `max_agents`.
        """
        self._config = require_config(start.hp_config, "a fresh agent has nothing to draw")
        self._size, self._interval = len(start.founders), start.interval
        if self.max_agents is not None and self.max_agents < self._size:
            raise ConfigurationError("max_agents", self.max_agents, f"is less than the {self._size} founders")
        self._values = dict(start.founders[0].hyperparameters)
        self._next_index = start.next_index
        self._num_agents = self._size
        self._decisions = 0
        # Agents that began later than at step 0, with the decision after which they began.
        self._began: dict[int, int] = {}
        self._rungs: list[list[Fitness]] = []
        self._rng = np.random.default_rng(self.rand_seed)
        return SearchPlan(tuple(start.founders), self._interval)

    def tell(self, results: Sequence[Result]) -> SearchPlan:
        """Let the members at a rung go on or leave; the best member and those between two rungs always go on.

        Raises:
            DivergedError: No member has a finite fitness.
        """
        finite = best_first(results)
        self._decisions += 1
        # By index, the rung that a member has just reached and the place of its fitness in the list of that rung.
        reached: dict[int, tuple[int, int]] = {}
        for result in finite:
            rung = self._rung_of(result.index)
            if rung is not None:
                self._rungs += [[] for _ in range(rung + 1 - len(self._rungs))]
                reached[result.index] = rung, len(self._rungs[rung])
                self._rungs[rung].append(result.fitness)
        stopped = {index for index, (rung, place) in reached.items() if place not in self._best_at(rung)}
        births = [
            result.kept(elite=result is finite[0])
            for result in results
            if result is finite[0] or (is_finite(result.fitness) and result.index not in stopped)
        ]
        self._began = {birth.index: self._began[birth.index] for birth in births if birth.index in self._began}
        most = self._size if self.max_agents is None else len(births) + self.max_agents - self._num_agents
        fresh: list[Birth] = []
        while len(births) + len(fresh) < min(self._size, most):
            values = self._draw([birth.hyperparameters for birth in fresh])
            if values is None:
                break
            fresh.append(Birth.fresh(self._next_index, values))
            self._began[self._next_index] = self._decisions
            self._next_index += 1
            self._num_agents += 1
        return SearchPlan((*births, *fresh), self._interval)

    def _rung_of(self, index: int) -> int | None:
        """The rung that a member has just reached, counted from 0; None between two rungs."""
        intervals, rung = self._decisions - self._began.get(index, 0), 0
        while intervals % self.reduction_factor == 0:
            intervals //= self.reduction_factor
            rung += 1
        return rung if intervals == 1 else None

    def _best_at(self, rung: int) -> list[int]:
        """Places in the list of a rung of the best 1 / `reduction_factor`; among equals the first are the best."""
        fitnesses = self._rungs[rung]
        return rank(fitnesses)[: max(1, len(fitnesses) // self.reduction_factor)]

    def _draw(self, others: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        """Hyperparameters that no other agent begins with now; None if `MAX_DRAWS` draws find none."""
        for _ in range(MAX_DRAWS):
            values = {**self._values, **self._config.sample(self._rng)}
            if values not in others:
                return values
        return None

    def state_dict(self) -> dict[str, Any]:
        """The fitnesses at all rungs, when the members began, the counters and the generator's state."""
        return {
            "next_index": self._next_index,
            "num_agents": self._num_agents,
            "decisions": self._decisions,
            "began": {str(index): decision for index, decision in self._began.items()},
            "rungs": [[list(fitness) for fitness in rung] for rung in self._rungs],
            "rng": self._rng.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state of `state_dict`.

        Raises:
            CheckpointError: `state` is not such a state; the search is unchanged then.
        """
        with reading_state():
            counters = [int(state[name]) for name in ("next_index", "num_agents", "decisions")]
            began = {int(index): int(decision) for index, decision in state["began"].items()}
            rungs = [[tuple(map(float, fitness)) for fitness in rung] for rung in state["rungs"]]
            rng = generator_of(state["rng"])
        self._next_index, self._num_agents, self._decisions = counters
        self._began, self._rungs, self._rng = began, rungs, rng
