"""Multiple-frequencies population based training, MF-PBT (Doulazmi et al. 2025, arXiv 2506.03225).

The population is divided into sub-populations, and each evolves at its own interval: one that evolves often finds what
is good soon, one that evolves seldom what is good in the end. When a sub-population evolves, children of its best
quarter replace its worst quarter, and better members of other sub-populations replace those just above (migration). A
migrant from a sub-population that evolves less often brings its hyperparameters along. One from a sub-population that
evolves more often brings its weights alone and takes the hyperparameters of the best member here, since its own may be
good for a short time only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from evollm.checks import whole_number
from evollm.errors import ConfigurationError
from evollm.hpo.fitness import is_finite, rank
from evollm.hpo.hyperparameters import Value
from evollm.hpo.lineage import Birth
from evollm.hpo.population_based_training import explore, quantiles
from evollm.hpo.search import (
    Result,
    SearchPlan,
    SearchStart,
    best_first,
    distinct_child,
    generator_of,
    is_taken,
    reading_state,
    require_config,
)

_QUARTER = 0.25


@dataclass
class MultiFrequencyPBT:
    """MF-PBT as an `evollm.hpo.Search`: no agent is ever equal to another.

    A migrant that would equal the member that it comes from is perturbed, unlike in the paper: here both would learn
    from the same batches and stay equal.

    Args:
        frequencies: For each sub-population, how many times `evo_steps` lie between two of its evolutions, in ascending
            order. The members are divided among the sub-populations as evenly as possible.
        rand_seed: Seed of the random draws.

    Raises:
        ConfigurationError: `frequencies` are not at least one integer of at least 1 in ascending order, or the seed is
            not an integer of at least 0.
    """

    frequencies: Sequence[int] = (1, 4)
    rand_seed: int = 42

    def __post_init__(self) -> None:
        if isinstance(self.frequencies, str) or not isinstance(self.frequencies, Sequence) or not self.frequencies:
            raise ConfigurationError("frequencies", self.frequencies, "must be a list such as [1, 4]")
        self.frequencies = tuple(whole_number("frequencies", frequency, 1) for frequency in self.frequencies)
        if any(second <= first for first, second in pairwise(self.frequencies)):
            raise ConfigurationError("frequencies", self.frequencies, "must ascend, such as [1, 4]")
        self.rand_seed = whole_number("rand_seed", self.rand_seed, 0)

    def start(self, start: SearchStart) -> SearchPlan:
        """Begin with the founders, unchanged.

        Raises:
            ConfigurationError: No hyperparameter may change, or there are less than two agents for each frequency.
        """
        self._config = require_config(start.hp_config, "a child has nothing to change")
        size, count = len(start.founders), len(self.frequencies)
        if size < 2 * count:
            fix = f"is too small for {count} sub-populations of at least 2 agents: give {2 * count} agents or more"
            raise ConfigurationError("population", size, fix)
        self._interval, self._decisions = start.interval, 0
        self._groups = {birth.index: place * count // size for place, birth in enumerate(start.founders)}
        self._next_index = start.next_index
        self._rng = np.random.default_rng(self.rand_seed)
        return SearchPlan(tuple(start.founders), self._interval)

    def tell(self, results: Sequence[Result]) -> SearchPlan:
        """Evolve the sub-populations whose interval is over; the members of the others are kept, diverged ones too.

        Raises:
            DivergedError: No member has a finite fitness.
        """
        best = best_first(results)[0]
        self._decisions += 1
        ranked = [results[place] for place in rank([result.fitness for result in results])]
        evolving = [group for group, every in enumerate(self.frequencies) if self._decisions % every == 0]
        changes = [change for group in evolving for change in self._changes(ranked, group)]
        leaving = {change.member.index for change in changes}
        births = [result.kept(elite=result is best) for result in results if result.index not in leaving]
        groups = {birth.index: self._groups[birth.index] for birth in births}
        for change in changes:
            child = self._child(change, births, results)
            if child is None and is_finite(change.member.fitness):
                child = change.member.kept()
            if child is not None:
                births.append(child)
                groups[child.index] = self._groups[change.member.index]
            self._next_index += 1
        self._groups = groups
        return SearchPlan(tuple(births), self._interval)

    def _changes(self, ranked: Sequence[Result], group: int) -> list[_Change]:
        """Who is replaced by whom when a sub-population evolves; `ranked` are all members, the best first."""
        members = [result for result in ranked if self._groups[result.index] == group]
        outside = [result for result in ranked if self._groups[result.index] != group and is_finite(result.fitness)]
        if not members:
            return []
        if not is_finite(members[0].fitness):
            return [_Change(member, outside[0], outside[0].hyperparameters, True) for member in members]
        parents, worst = quantiles(members, _QUARTER)
        drawn = [parents[int(self._rng.integers(len(parents)))] for _ in worst]
        replaced = [member for member in members if member.index in worst]
        changes = [
            _Change(member, parent, parent.hyperparameters, True)
            for member, parent in zip(replaced, drawn, strict=True)
        ]
        middle = [member for member in members[len(parents) :] if member.index not in worst]
        for member in middle[-len(parents) :]:
            if outside and outside[0].fitness > member.fitness:
                migrant = outside.pop(0)
                is_steadier = self._groups[migrant.index] > group
                values = (migrant if is_steadier else members[0]).hyperparameters
                changes.append(_Change(member, migrant, values, False))
        return changes

    def _child(self, change: _Change, births: Sequence[Birth], results: Sequence[Result]) -> Birth | None:
        if not change.explores and not is_taken(change.parent, change.values, births, results):
            return change.parent.child(self._next_index, change.values)
        return distinct_child(change.parent, self._next_index, births, results, self._explore, change.values)

    def _explore(self, values: Mapping[str, Value]) -> dict[str, Value]:
        return explore(values, self._config, 0.0, self._rng)

    def state_dict(self) -> dict[str, Any]:
        """The sub-population of every member, the counters and the generator's state."""
        return {
            "next_index": self._next_index,
            "decisions": self._decisions,
            "groups": {str(index): group for index, group in self._groups.items()},
            "rng": self._rng.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state of `state_dict`.

        Raises:
            CheckpointError: `state` is not such a state; the search is unchanged then.
        """
        with reading_state():
            next_index, decisions = int(state["next_index"]), int(state["decisions"])
            groups = {int(index): int(group) for index, group in state["groups"].items()}
            rng = generator_of(state["rng"])
        self._next_index, self._decisions, self._groups, self._rng = next_index, decisions, groups, rng


@dataclass(frozen=True)
class _Change:
    """The replacement of a member.

    Attributes:
        member: The member that leaves.
        parent: The member that has a child in its place.
        values: Hyperparameters of the child.
        explores: Whether they are perturbed.
    """

    member: Result
    parent: Result
    values: Mapping[str, Value]
    explores: bool
