"""Tournament selection with mutation, the search of `tournament=` and `mutation=`.

After every interval a tournament says whose weights are exploited, and a mutation of one hyperparameter explores: the
exploit and explore of population based training (arXiv 1711.09846) with the selection of Goldberg and Deb (1991).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from evollm.checks import whole_number
from evollm.errors import CheckpointError, ConfigurationError, DivergedError
from evollm.foreign import TOURNAMENT, TOURNAMENT_ORDER, explains_construction
from evollm.hpo.fitness import Fitness, is_finite, rank
from evollm.hpo.hyperparameters import HyperparameterConfig
from evollm.hpo.lineage import Birth
from evollm.hpo.mutation import Mutations, mutate
from evollm.hpo.search import Result, SearchPlan, SearchStart

# All agents see the same batches, so two children of one parent with the same hyperparameters would be one agent
# computed twice. A mutated child that is such a twin is drawn anew, this often at most.
ATTEMPTS = 10


@explains_construction(TOURNAMENT, TOURNAMENT_ORDER)
@dataclass(frozen=True)
class TournamentSelection:
    """Settings of the selection between two generations.

    A tournament draws `tournament_size` different agents and its best one becomes a parent (Goldberg and Deb 1991). A
    larger tournament selects harder: 1 is chance, `population_size` always takes the best agent.

    Args:
        tournament_size: How many agents meet in a tournament.
        elitism: Whether the best agent passes into the next generation as it is.
        population_size: How many agents there are in every generation.
        rand_seed: Seed of the draws; given by its name.

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
    """Check, before training, that a tournament was made for a population of `size` agents.

    Raises:
        ConfigurationError: If it was made for another size.
    """
    if tournament.population_size != size:
        fix = f"but the population has {size} agents; use TournamentSelection(population_size={size})"
        raise ConfigurationError("population_size", tournament.population_size, fix)


def select_parents(
    fitnesses: Sequence[Fitness], settings: TournamentSelection, rng: np.random.Generator
) -> tuple[int, list[int]]:
    """Draw the parents of the next generation.

    Agents whose fitness is not finite are neither drawn nor elite. Where fewer than `tournament_size` are left, all of
    them meet.

    Args:
        fitnesses: One for each agent.
        settings: The tournament.
        rng: Consumed by one draw for each slot that the elite does not fill.

    Returns:
        The position of the best agent, and the position of the parent of each slot. With elitism the best agent fills
        the first slot itself, so there is one parent less than there are agents; without, it is only reported.

    Raises:
        DivergedError: If no fitness is finite.
    """
    best_first = [position for position in rank(fitnesses) if is_finite(fitnesses[position])]
    if not best_first:
        raise DivergedError(
            f"none of the {len(fitnesses)} agents has a finite fitness, so nobody can be a parent; "
            "lower lr or its upper bound, or set max_grad_norm"
        )
    contenders = min(settings.tournament_size, len(best_first))
    slots = len(fitnesses) - int(settings.elitism)
    # Places in best_first are drawn, so the smallest place is the winner, ties included.
    places = [int(rng.choice(len(best_first), size=contenders, replace=False).min()) for _ in range(slots)]
    return best_first[0], [best_first[place] for place in places]


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
    """Decide who has which children with which hyperparameters; changes nothing but the two generators.

    The same arguments and generator states give the same births.

    Args:
        results: Of the population in slot order.
        tournament: How parents are selected.
        mutations: How children are mutated.
        hp_config: The hyperparameters that may change; None if none may.
        next_index: The first index for a new agent.
        tournament_rng: Draws the parents.
        mutation_rng: Draws the mutations.

    Returns:
        (population size,) the next generation in slot order, a kept elite first.

    Raises:
        ConfigurationError: If the tournament is for another population size, two members have the same index, or
            `next_index` is taken.
        DivergedError: If no member has a finite fitness. No generator has been consumed then.
    """
    check_population(tournament, len(results))
    _check_indices([result.index for result in results], next_index)
    elite, parents = select_parents([result.fitness for result in results], tournament, tournament_rng)
    births = [results[elite].kept(elite=True)] if tournament.elitism else []
    for index, position in enumerate(parents, start=next_index):
        for _ in range(ATTEMPTS):
            child = _child(index, results[position], hp_config, mutations, mutation_rng)
            if not child.mutations or not any(_are_twins(child, other) for other in births):
                break
        births.append(child)
    return tuple(births)


def _child(
    index: int, parent: Result, hp_config: HyperparameterConfig | None, mutations: Mutations, rng: np.random.Generator
) -> Birth:
    changes = mutate(parent.hyperparameters, hp_config, mutations, rng)
    values = {**parent.hyperparameters, **{change.name: change.after for change in changes}}
    return Birth(index, parent.index, changes, False, values)


def _are_twins(one: Birth, other: Birth) -> bool:
    return one.parent == other.parent and one.hyperparameters == other.hyperparameters


def _check_indices(indices: Sequence[int], next_index: int) -> None:
    if len(set(indices)) != len(indices):
        raise ConfigurationError("index", list(indices), "two agents share an index; give each its own")
    if next_index <= max(indices):
        raise ConfigurationError("next_index", next_index, f"must be above the largest index in use, {max(indices)}")


@dataclass
class TournamentSearch:
    """Tournament selection and mutation as an `evollm.hpo.Search`: the same number of members in every generation.

    Args:
        tournament: How parents are selected; None: the defaults, for as many agents as there are.
        mutation: How children are mutated.
    """

    tournament: TournamentSelection | None = None
    mutation: Mutations = Mutations()  # noqa: RUF009 - it is frozen

    def start(self, start: SearchStart) -> SearchPlan:
        """Begin with the founders as they are.

        Raises:
            ConfigurationError: The tournament is for another population size, or a mutation has nothing to change.
        """
        size = len(start.founders)
        self._settings = self.tournament or TournamentSelection(min(2, size), population_size=size)
        check_population(self._settings, size)
        if not start.hp_config and self.mutation.rl_hp > 0:
            fix = "a mutation has nothing to change: build the agents with hp_config=HyperparameterConfig(lr=...)"
            raise ConfigurationError("hp_config", start.hp_config, fix)
        self._hp_config, self._interval, self._next_index = start.hp_config, start.interval, 0
        # The second number keeps the streams apart when both seeds are the same, as they are by default.
        self._tournament_rng = np.random.default_rng([self._settings.rand_seed, 0])
        self._mutation_rng = np.random.default_rng([self.mutation.rand_seed, 1])
        return SearchPlan(tuple(start.founders), self._interval)

    def tell(self, results: Sequence[Result]) -> SearchPlan:
        """Plan the next generation with `plan_births`, whose errors these are.

        New agents get indices that neither a member nor any agent of an earlier plan had.
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
        """Continue where `state_dict` was taken.

        Raises:
            CheckpointError: If `state` is not such a state; this object is as before then.
        """
        try:
            next_index = int(state["next_index"])
            tournament_rng, mutation_rng = (_generator(state[name]) for name in ("tournament_rng", "mutation_rng"))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the state of the search is incomplete or from elsewhere: {error!r}") from error
        self._next_index, self._tournament_rng, self._mutation_rng = next_index, tournament_rng, mutation_rng


def _generator(state: Mapping[str, Any]) -> np.random.Generator:
    rng = np.random.default_rng(0)
    rng.bit_generator.state = state
    return rng
