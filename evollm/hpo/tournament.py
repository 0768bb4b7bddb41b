"""Tournament selection with mutation and crossover, the search of `tournament=` and `mutation=`.

These are the exploit and explore steps of population based training (arXiv 1711.09846): after every interval
tournaments (Goldberg and Deb 1991) select the parents, whose weights are copied, and a hyperparameter mutates. With
`Mutations(crossover=...)` some children have the mean of two parents' weights instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from evollm.checks import whole_number
from evollm.errors import ConfigurationError, DivergedError
from evollm.foreign import TOURNAMENT, TOURNAMENT_ORDER, explains_construction
from evollm.hpo.fitness import Fitness, is_finite, rank
from evollm.hpo.hyperparameters import HyperparameterConfig, Value
from evollm.hpo.lineage import Birth
from evollm.hpo.mutation import Mutations, mutate
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

_ALWAYS = Mutations(no_mutation=0.0, rl_hp=1.0)


@explains_construction(TOURNAMENT, TOURNAMENT_ORDER)
@dataclass(frozen=True)
class TournamentSelection:
    """Settings of the selection between two generations.

    A tournament draws `tournament_size` different agents, and the best becomes a parent (Goldberg and Deb 1991). A
    larger tournament selects harder: 1 is random, `population_size` always takes the best agent.

    Args:
        tournament_size: Agents in a tournament.
        elitism: Whether the best agent passes into the next generation unchanged.
        population_size: Agents in every generation; fewer where some would be copies of one agent (see `plan_births`).
        rand_seed: Seed of the random draws; a keyword argument.

    Raises:
        ConfigurationError: If a size is below 1, the tournament is larger than the population, `elitism` is not a bool
            or the seed is not an integer of at least 0.
    """

    tournament_size: int = 2
    elitism: bool = True
    population_size: int = 4
    _: KW_ONLY
    rand_seed: int = 42

    def __post_init__(self) -> None:
        """Check the fields against each other."""
        for field, minimum in (("population_size", 1), ("tournament_size", 1), ("rand_seed", 0)):
            object.__setattr__(self, field, whole_number(field, getattr(self, field), minimum))
        if self.tournament_size > self.population_size:
            fix = f"is larger than population_size={self.population_size}; use at most that many"
            raise ConfigurationError("tournament_size", self.tournament_size, fix)
        if not isinstance(self.elitism, bool):
            raise ConfigurationError("elitism", self.elitism, "must be True or False")


def check_population(tournament: TournamentSelection, size: int) -> None:
    """Check, before training, that a tournament's `population_size` is the size of the population.

    Raises:
        ConfigurationError: If the two differ.
    """
    if tournament.population_size != size:
        fix = f"but the population has {size} agents; use TournamentSelection(population_size={size})"
        raise ConfigurationError("population_size", tournament.population_size, fix)


def select_parents(
    fitnesses: Sequence[Fitness], settings: TournamentSelection, rng: np.random.Generator
) -> tuple[int, list[int]]:
    """Draw the parents of the next generation of `population_size` agents.

    Agents whose fitness is not finite are neither drawn nor elite. If fewer than `tournament_size` agents are left, a
    tournament has all of them.

    Args:
        fitnesses: The fitness of each agent.
        settings: The tournament.
        rng: Consumed by one draw for each child.

    Returns:
        The position of the best agent, and the position of the parent of each child. With elitism the best agent is
        kept, so that there is one child less.

    Raises:
        DivergedError: If no fitness is finite.
    """
    finite = [position for position in rank(fitnesses) if is_finite(fitnesses[position])]
    if not finite:
        raise DivergedError(
            f"none of the {len(fitnesses)} agents has a finite fitness, so none can be a parent; "
            "lower lr or its upper bound, or set max_grad_norm"
        )
    size = min(settings.tournament_size, len(finite))
    num_children = settings.population_size - int(settings.elitism)
    # Ranks are drawn, and the lowest rank wins; agents of equal fitness have different ranks.
    winners = [int(rng.choice(len(finite), size=size, replace=False).min()) for _ in range(num_children)]
    return finite[0], [finite[winner] for winner in winners]


def plan_births(
    results: Sequence[Result],
    *,
    tournament: TournamentSelection,
    mutations: Mutations,
    hp_config: HyperparameterConfig | None,
    next_index: int,
    tournament_rng: np.random.Generator,
    mutation_rng: np.random.Generator,
) -> tuple[Birth, ...]:
    """Select the parents and draw the hyperparameters of the next generation; changes only the two generators.

    The same arguments and generator states give the same births. No two agents of the next generation are equal: a
    child that would equal an agent that is born already, such as an unmutated copy of the elite, mutates until it does
    not. Where it cannot differ, its place goes to the best member that would leave, or stays empty if there is none.
    A crossover, which has two different winners of tournaments as parents, needs a second member that is not diverged.

    Args:
        results: The results of all members, in the order of the population.
        tournament: Settings of the selection.
        mutations: Settings of the mutation.
        hp_config: The hyperparameters that may change; None if none may.
        next_index: The first index for a new agent.
        tournament_rng: Draws the parents.
        mutation_rng: Draws the mutations, and which children come from a crossover.

    Returns:
        The next generation, at most `population_size` agents, a kept elite first.

    Raises:
        ConfigurationError: If the tournament is for a smaller population, two members have the same index, or
            `next_index` is taken.
        DivergedError: If no member has a finite fitness. No generator has been consumed then.
    """
    if len(results) > tournament.population_size:
        check_population(tournament, len(results))
    indices = [result.index for result in results]
    if len(set(indices)) != len(indices):
        raise ConfigurationError("index", indices, "two agents share an index; give each its own")
    if next_index <= max(indices):
        raise ConfigurationError("next_index", next_index, f"must be above the largest index in use, {max(indices)}")
    elite, parents = select_parents([result.fitness for result in results], tournament, tournament_rng)
    births = [results[elite].kept(elite=True)] if tournament.elitism else []
    finite = best_first(results)

    def redrawn(values: Mapping[str, Value]) -> dict[str, Value]:
        return {one.name: one.after for one in mutate(values, hp_config, _ALWAYS, mutation_rng)}

    for index, position in enumerate(parents, start=next_index):
        parent = results[position]
        crosses = mutations.crossover > 0 and mutation_rng.random() < mutations.crossover
        second = _second_parent(parent, finite, tournament, tournament_rng) if crosses else None
        drawn = (
            parent.mutated(index, mutate(parent.hyperparameters, hp_config, mutations, mutation_rng))
            if second is None
            else parent.crossed(index, second, hp_config)
        )
        child: Birth | None = drawn
        values = drawn.hyperparameters
        if is_taken(parent, values, births, results, second):
            begin = values if second else parent.hyperparameters
            may_change = hp_config and mutations.rl_hp
            child = distinct_child(parent, index, births, results, redrawn, begin, second) if may_change else None
        if child is None:
            left = (one for one in finite if not is_taken(one, one.hyperparameters, births, results))
            child = next((one.kept() for one in left), None)
        if child is not None:
            births.append(child)
    return tuple(births)


def _second_parent(
    parent: Result, finite: Sequence[Result], settings: TournamentSelection, rng: np.random.Generator
) -> Result | None:
    """The winner of a tournament of the others, of which the best come first; None if there are no others."""
    others = [one for one in finite if one.index != parent.index and not one.equals(parent)]
    size = min(settings.tournament_size, len(others))
    return others[int(rng.choice(len(others), size=size, replace=False).min())] if others else None


@dataclass
class TournamentSearch:
    """Tournament selection and mutation as an `evollm.hpo.Search`.

    Args:
        tournament: Settings of the selection; None: the defaults, for the population's size.
        mutation: Settings of the mutation.
    """

    tournament: TournamentSelection | None = None
    mutation: Mutations = Mutations()  # noqa: RUF009 - it is frozen

    def start(self, start: SearchStart) -> SearchPlan:
        """Begin with the founders, unchanged.

        Raises:
            ConfigurationError: The tournament is for another population size, or a mutation has nothing to change.
        """
        size = len(start.founders)
        self._settings = self.tournament or TournamentSelection(min(2, size), population_size=size)
        check_population(self._settings, size)
        if self.mutation.rl_hp > 0:
            require_config(start.hp_config, "a mutation has nothing to change")
        self._hp_config, self._interval, self._next_index = start.hp_config, start.interval, 0
        # The second number makes the two generators differ when both seeds are equal, as they are by default.
        self._tournament_rng = np.random.default_rng([self._settings.rand_seed, 0])
        self._mutation_rng = np.random.default_rng([self.mutation.rand_seed, 1])
        return SearchPlan(tuple(start.founders), self._interval)

    def tell(self, results: Sequence[Result]) -> SearchPlan:
        """Plan the next generation with `plan_births`, and raise its errors.

        New agents get indices above those of all members and of all earlier plans.
        """
        births = plan_births(
            results,
            tournament=self._settings,
            mutations=self.mutation,
            hp_config=self._hp_config,
            next_index=max([self._next_index, *(result.index + 1 for result in results)]),
            tournament_rng=self._tournament_rng,
            mutation_rng=self._mutation_rng,
        )
        self._next_index = 1 + max([*(result.index for result in results), *(birth.index for birth in births)])
        return SearchPlan(births, self._interval)

    def state_dict(self) -> dict[str, Any]:
        """Return the next index and both generator states as plain JSON values."""
        return {
            "next_index": self._next_index,
            "tournament_rng": self._tournament_rng.bit_generator.state,
            "mutation_rng": self._mutation_rng.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state of `state_dict`.

        Raises:
            CheckpointError: If `state` is not such a state; the search is unchanged then.
        """
        with reading_state():
            next_index = int(state["next_index"])
            tournament_rng, mutation_rng = (generator_of(state[name]) for name in ("tournament_rng", "mutation_rng"))
        self._next_index, self._tournament_rng, self._mutation_rng = next_index, tournament_rng, mutation_rng
