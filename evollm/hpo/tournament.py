"""Who becomes a parent: tournament selection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np

from evollm.checks import whole_number
from evollm.errors import ConfigurationError, DivergedError
from evollm.foreign import TOURNAMENT, TOURNAMENT_ORDER, explains_construction
from evollm.hpo.fitness import Fitness, is_finite, rank


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
