from __future__ import annotations

import math

import numpy as np
import pytest

from evollm.errors import ConfigurationError, DivergedError
from evollm.hpo import TournamentSelection, check_population, select_parents

FITNESSES = [(0.5,), (0.9,), (0.7,), (0.6,)]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_the_best_agent_is_the_elite_and_the_other_slots_get_a_parent_each() -> None:
    elite, parents = select_parents(FITNESSES, TournamentSelection(), rng())
    assert elite == 1
    assert len(parents) == 3


def test_without_elitism_every_slot_gets_a_parent_and_the_best_is_still_reported() -> None:
    elite, parents = select_parents(FITNESSES, TournamentSelection(elitism=False), rng())
    assert elite == 1
    assert len(parents) == 4


def test_parents_win_a_tournament_of_different_agents() -> None:
    """Of all pairs of 4 agents the best wins 3 of 6, the second 2, the third 1, the worst none."""
    settings = TournamentSelection(population_size=4, tournament_size=2)
    generator = rng()
    parents = [parent for _ in range(1000) for parent in select_parents(FITNESSES, settings, generator)[1]]
    shares = np.bincount(parents, minlength=4) / len(parents)
    assert shares == pytest.approx([0, 1 / 2, 1 / 3, 1 / 6], abs=0.03)


def test_a_tournament_of_everybody_is_always_won_by_the_best() -> None:
    assert select_parents(FITNESSES, TournamentSelection(tournament_size=4), rng()) == (1, [1, 1, 1])


def test_a_tournament_of_one_is_chance() -> None:
    generator = rng()
    settings = TournamentSelection(tournament_size=1)
    drawn = {parent for _ in range(100) for parent in select_parents(FITNESSES, settings, generator)[1]}
    assert drawn == {0, 1, 2, 3}


def test_a_tie_goes_to_the_agent_that_comes_first() -> None:
    assert select_parents([(0.5,)] * 4, TournamentSelection(tournament_size=4), rng()) == (0, [0, 0, 0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tournament_size", [1, 2, 4])
def test_an_agent_that_is_not_finite_is_never_elite_nor_parent(bad: float, tournament_size: int) -> None:
    settings = TournamentSelection(tournament_size=tournament_size, elitism=False)
    for seed in range(100):
        elite, parents = select_parents([(bad, 1.0), (0.5, 0.0), (0.9, bad), (0.4, 0.0)], settings, rng(seed))
        assert elite == 1
        assert set(parents) <= {1, 3}


def test_a_last_finite_agent_is_the_parent_of_all() -> None:
    assert select_parents([(math.nan,), (0.1,), (math.nan,), (math.inf,)], TournamentSelection(), rng()) == (1, [1] * 3)


def test_nobody_finite_raises_before_anything_is_drawn() -> None:
    generator, before = rng(), rng().bit_generator.state
    with pytest.raises(DivergedError, match="none of the 4 agents"):
        select_parents([(math.nan,)] * 4, TournamentSelection(), generator)
    assert generator.bit_generator.state == before


def test_a_population_of_one_keeps_its_agent() -> None:
    settings = TournamentSelection(tournament_size=1, population_size=1)
    assert select_parents([(0.5,)], settings, rng()) == (0, [])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tournament_size": 5, "population_size": 4}, "tournament_size=5.*population_size=4"),
        ({"population_size": 0}, "population_size=0.*at least 1"),
        ({"population_size": 4.0}, "population_size=4.0.*whole number"),
        ({"tournament_size": 0}, "tournament_size=0.*at least 1"),
        ({"tournament_size": True}, "tournament_size=True.*whole number"),
        ({"elitism": 1}, "elitism=1.*True or False"),
        ({"rand_seed": -1}, "rand_seed=-1.*at least 0"),
        ({"rand_seed": None}, "rand_seed=None.*whole number"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        TournamentSelection(**arguments)  # type: ignore[arg-type]


def test_a_tournament_for_another_population_names_both_sizes() -> None:
    check_population(TournamentSelection(population_size=4), 4)
    with pytest.raises(ConfigurationError, match=r"population_size=4.*6 agents"):
        check_population(TournamentSelection(population_size=4), 6)
