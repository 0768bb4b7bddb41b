from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from evollm.errors import CheckpointError, ConfigurationError, DivergedError
from evollm.hpo import (
    Birth,
    Evaluation,
    EvolutionPlan,
    HyperparameterConfig,
    Mutation,
    Mutations,
    Result,
    RLParameter,
    SearchStart,
    TournamentSearch,
    TournamentSelection,
    ancestry,
    plan_births,
    rank,
)
from evollm.training import carry_out

CONFIG = HyperparameterConfig(lr=RLParameter(min=1e-7, max=1e-4), beta=RLParameter(min=0.01, max=1.0))


def members(fitnesses: Sequence[float] = (0.5, 0.9, 0.7, 0.6)) -> list[Result]:
    return [Result(i, (fitness, 0.0), {"lr": 1e-5 * (i + 1), "beta": 0.1}) for i, fitness in enumerate(fitnesses)]


def plan(population: list[Result], seed: int = 0, *, next_index: int = 4, **settings: object) -> EvolutionPlan:
    arguments: dict[str, object] = {"tournament": TournamentSelection(), "mutations": Mutations(), "hp_config": CONFIG}
    births = plan_births(
        population,
        next_index=next_index,
        tournament_rng=np.random.default_rng([seed, 0]),
        mutation_rng=np.random.default_rng([seed, 1]),
        **{**arguments, **settings},  # type: ignore[arg-type]
    )
    return recorded(births, population)


def recorded(births: tuple[Birth, ...], population: list[Result], generation: int = 0) -> EvolutionPlan:
    """The births of a plan as a run records them."""
    fitnesses = {member.index: member.fitness for member in population}
    best = population[rank(list(fitnesses.values()))[0]]
    return EvolutionPlan(generation, best.index, fitnesses, births)


def test_the_elite_comes_first_unmutated_under_its_own_index() -> None:
    for seed in range(50):
        made = plan(members(), seed, mutations=Mutations(0.0, 1.0))
        assert made.elite == 1
        assert made.births[0] == Birth(1, 1, (), True, {"lr": 2e-5, "beta": 0.1})
        assert [birth.elite for birth in made.births[1:]] == [False] * 3


def test_every_other_slot_gets_an_index_that_was_never_used() -> None:
    assert [birth.index for birth in plan(members(), next_index=11).births] == [1, 11, 12, 13]


def test_a_child_has_its_parents_values_but_for_its_mutations() -> None:
    population = members()
    for seed in range(50):
        for birth in plan(population, seed).births:
            assert birth.parent is not None
            expected = dict(population[birth.parent].hyperparameters)
            for mutation in birth.mutations:
                assert mutation.before == expected[mutation.name]
                expected[mutation.name] = mutation.after
            assert birth.hyperparameters == expected


def twins(made: EvolutionPlan, population: list[Result]) -> int:
    """Births beyond the first with the same parent, or an equal one, and the same values."""
    parents = {member.index: member for member in population}
    kinds: list[Birth] = []
    for birth in made.births:
        if not any(
            parents[birth.parent].equals(parents[other.parent]) and birth.hyperparameters == other.hyperparameters
            for other in kinds
        ):
            kinds.append(birth)
    return len(made.births) - len(kinds)


ONE_CHOICE = HyperparameterConfig(loss=RLParameter(choices=("sigmoid", "ipo")))


@pytest.mark.parametrize("weights", [(0.0, 1.0), (0.3, 0.7), (0.9, 0.1), (1.0, 0.0)])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("elitism", [True, False])
def test_no_two_agents_of_a_generation_are_equal(weights, size, elitism) -> None:
    tournament = TournamentSelection(size, elitism, 4)
    for seed in range(50):
        made = plan(members(), seed, mutations=Mutations(*weights), tournament=tournament)
        assert (len(made.births), twins(made, members())) == (4, 0)


def test_a_copy_of_the_elite_mutates_and_one_of_an_agent_that_leaves_may_stay_a_copy() -> None:
    seen = set()
    for seed in range(50):
        made = plan(members(), seed, mutations=Mutations(0.9, 0.1))
        assert all(birth.mutations for birth in made.births[1:] if birth.parent == 1)
        seen |= {bool(birth.mutations) for birth in made.births if birth.parent == 2}
    assert seen == {True, False}


def test_children_that_cannot_differ_leave_their_places_to_the_best_of_the_others() -> None:
    """Of the elite and its choice of two losses there are two agents; the best others keep the other places."""
    population = [Result(i, (fitness,), {"loss": "sigmoid"}, 4) for i, fitness in enumerate((0.5, 0.9, 0.7, 0.6))]
    tournament = TournamentSelection(4, True, 4)
    made = plan(population, mutations=Mutations(0.0, 1.0), hp_config=ONE_CHOICE, tournament=tournament).births
    assert [(birth.parent, birth.hyperparameters["loss"]) for birth in made] == [
        (1, "sigmoid"),
        (1, "ipo"),
        (2, "sigmoid"),
        (3, "sigmoid"),
    ]
    assert [birth.index for birth in made] == [1, 4, 2, 3]
    # A diverged agent is not kept: its place stays empty.
    population[3] = Result(3, (math.nan,), {"loss": "sigmoid"}, 4)
    population[0] = Result(0, (math.inf,), {"loss": "sigmoid"}, 4)
    made = plan(population, mutations=Mutations(0.0, 1.0), hp_config=ONE_CHOICE, tournament=tournament).births
    assert [birth.index for birth in made] == [1, 4, 2]


def test_without_mutations_all_finite_agents_go_on_and_equal_ones_once() -> None:
    only_selection = {
        "mutations": Mutations(1.0, 0.0),
        "hp_config": None,
        "tournament": TournamentSelection(4, True, 4),
    }
    assert [birth.parent for birth in plan(members(), **only_selection).births] == [1, 2, 3, 0]
    equal = [Result(i, (0.5,), {"lr": 1e-5, "beta": 0.1}, 4) for i in range(4)]
    assert [birth.index for birth in plan(equal, **only_selection).births] == [0]
    evaluated = [replace(one, evaluation=Evaluation([1.0, i // 2], [0.0, 0.0])) for i, one in enumerate(equal)]
    assert [birth.index for birth in plan(evaluated, **only_selection).births] == [0, 2]


def test_founders_that_are_equal_become_different() -> None:
    """As those of `sample_hyperparameters=False`; with one hyperparameter a mutation may follow on another."""
    equal = [Result(i, (0.5,), {"lr": 1e-5, "beta": 0.1}, 4) for i in range(4)]
    for config in (CONFIG, HyperparameterConfig(lr=CONFIG["lr"])):
        for seed in range(50):
            made = plan(equal, seed, hp_config=config)
            assert (len(made.births), twins(made, equal)) == (4, 0)


def test_a_population_that_has_become_smaller_grows_again() -> None:
    made = plan(members((0.5, 0.9)), next_index=7).births
    assert [birth.index for birth in made] == [1, 7, 8, 9]


def test_without_elitism_the_best_is_reported_but_nobody_is_kept() -> None:
    made = plan(members(), tournament=TournamentSelection(elitism=False))
    assert made.elite == 1
    assert [birth.index for birth in made.births] == [4, 5, 6, 7]
    assert not any(birth.elite for birth in made.births)


def test_without_a_config_nothing_mutates() -> None:
    made = plan(members(), hp_config=None, mutations=Mutations(0.0, 1.0))
    assert [birth.mutations for birth in made.births] == [()] * 4
    assert twins(made, members()) == 0


def test_a_diverged_agent_is_neither_elite_nor_parent() -> None:
    for seed in range(100):
        made = plan(members((math.nan, 0.2, math.inf, 0.1)), seed)
        assert made.elite == 1
        assert {birth.parent for birth in made.births} <= {1, 3}


def test_a_population_that_diverged_as_a_whole_raises() -> None:
    with pytest.raises(DivergedError):
        plan(members([math.nan] * 4))


def test_equal_inputs_give_equal_plans_whatever_the_global_state() -> None:
    made = []
    for global_seed in (0, 1):
        random.seed(global_seed)
        np.random.seed(global_seed)
        before = random.getstate(), np.random.get_state()[1].tolist()
        made.append([plan(members(), seed) for seed in range(10)])
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    assert made[0] == made[1]
    assert made[0][0] != made[0][1]


def test_a_plan_does_not_follow_later_changes_of_its_agents() -> None:
    values = {"lr": 1e-5, "beta": 0.1}
    made = plan([Result(i, (0.1 * i,), values) for i in range(4)], mutations=Mutations(1.0, 0.0))
    values["lr"] = 7.0
    assert {birth.hyperparameters["lr"] for birth in made.births} == {1e-5}


def test_a_population_of_another_size_names_both_sizes() -> None:
    with pytest.raises(ConfigurationError, match=r"population_size=4.*5 agents"):
        plan(members((0.1, 0.2, 0.3, 0.4, 0.5)), next_index=5)


def test_an_index_that_is_taken_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"next_index=3.*3"):
        plan(members(), next_index=3)
    with pytest.raises(ConfigurationError, match=r"index=\[0, 0, 0, 0\]"):
        plan([Result(0, (0.5,), {"lr": 1e-5, "beta": 0.1})] * 4)


def evolve(search: TournamentSearch, generations: int, population: list[Result] | None = None) -> list[EvolutionPlan]:
    """Evolve agents whose fitness is their lr; the plans of each generation."""
    population, plans = population or members(), []
    for generation in range(generations):
        plans.append(recorded(search.tell(population).births, population, generation))
        population = [
            Result(birth.index, (birth.hyperparameters["lr"],), birth.hyperparameters) for birth in plans[-1].births
        ]
    return plans


def search(tournament: int = 42, mutation: int = 42) -> TournamentSearch:
    """A search of these seeds that has begun with four founders."""
    made = TournamentSearch(TournamentSelection(rand_seed=tournament), Mutations(rand_seed=mutation))
    founders = [Birth.fresh(one.index, one.hyperparameters) for one in members()]
    plan = made.start(SearchStart(founders, CONFIG, interval=5))
    assert (list(plan.births), plan.steps) == (founders, 5)
    return made


def test_equal_seeds_give_equal_lineages_and_other_seeds_others() -> None:
    assert evolve(search(), 6) == evolve(search(), 6)
    assert evolve(search(), 6) != evolve(search(tournament=1), 6)
    assert evolve(search(), 6) != evolve(search(mutation=1), 6)


def test_equal_seeds_of_tournament_and_mutations_are_two_streams() -> None:
    state = search().state_dict()
    assert state["tournament_rng"]["state"] != state["mutation_rng"]["state"]


def test_indices_are_unique_over_a_run() -> None:
    born = [birth.index for made in evolve(search(), 8) for birth in made.births if not birth.elite]
    assert len(born) == len(set(born)) == 8 * 3
    assert min(born) == 4


def test_an_index_is_not_given_again_after_its_agent_left() -> None:
    """Agents 0 to 3, of which 3 dies: without a memory the next new agent would be 3 again."""
    used = search()
    used.tell(members())
    again = used.tell(members())
    assert [birth.index for birth in again.births] == [1, 7, 8, 9]


def test_a_search_continues_from_its_state_in_json() -> None:
    whole = evolve(search(), 6)
    first = search()
    evolve(first, 3)
    second = search(9, 9)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    population = [
        Result(birth.index, (birth.hyperparameters["lr"],), birth.hyperparameters) for birth in whole[2].births
    ]
    resumed = [made.births for made in evolve(second, 3, population)]
    assert resumed == [made.births for made in whole[3:]]


@pytest.mark.parametrize("broken", [{}, {"next_index": 1, "tournament_rng": None, "mutation_rng": None}])
def test_a_state_from_elsewhere_is_refused_and_changes_nothing(broken: dict[str, object]) -> None:
    used = search()
    before = used.state_dict()
    with pytest.raises(CheckpointError, match="state of the search"):
        used.load_state_dict(broken)
    assert used.state_dict() == before


def test_the_ancestry_of_a_run_ends_at_the_agents_own_values() -> None:
    plans = evolve(search(), 6)
    for last in plans[-1].births:
        line = ancestry(plans, last.index)
        assert len(line) == 7
        assert line[0].parent is None
        assert line[0].hyperparameters == members()[line[0].index].hyperparameters
        assert line[-1] == last
        assert all(child.parent == parent.index for parent, child in pairwise(line))


class FakeAgent:
    """An agent that is nothing but a weight and hyperparameters, and writes down what happens to it."""

    def __init__(self, index: int, weight: str, values: dict[str, float], events: list[str]) -> None:
        self.index, self.weight, self.values, self.events = index, weight, values, events
        self.num_hooked = 0
        self.alive = True

    def hyperparameter_values(self) -> dict[str, float]:
        return dict(self.values)

    def clone(self, index: int) -> FakeAgent:
        self.events.append(f"clone {self.index} as {index}")
        return FakeAgent(index, self.weight, dict(self.values), self.events)

    def set_hyperparameters(self, values: Mapping[str, float]) -> None:
        self.events.append(f"set {self.index}")
        self.values = dict(values)

    def mutation_hook(self) -> None:
        self.num_hooked += 1

    def release(self) -> None:
        self.events.append(f"release {self.index}")
        self.alive = False


def lr_of(index: int) -> float:
    return 1e-5 * (index + 1)


def population() -> list[FakeAgent]:
    events: list[str] = []
    return [FakeAgent(i, f"weight of {i}", {"lr": lr_of(i)}, events) for i in range(4)]


def birth(index: int, parent: int, lr: float | None = None) -> Birth:
    inherited = lr_of(parent)
    changes = () if lr is None else (Mutation("lr", inherited, lr, lr / inherited),)
    return Birth(index, parent, changes, index == parent, {"lr": inherited if lr is None else lr})


def test_agents_without_a_child_are_released_before_anything_is_cloned() -> None:
    agents = population()
    carry_out((birth(1, 1), birth(4, 1), birth(5, 2), birth(6, 2)), agents)
    assert agents[0].events == [
        "release 0",
        "release 3",
        "clone 1 as 4",
        "set 4",
        "clone 2 as 5",
        "set 5",
        "set 6",
    ]


def test_the_kept_elite_is_the_same_object_and_nothing_in_it_is_touched() -> None:
    agents = population()
    after = carry_out((birth(1, 1), birth(4, 1, 9e-5), birth(5, 1), birth(6, 1)), agents)
    assert after[0] is agents[1]
    assert (after[0].index, after[0].values, after[0].alive) == (1, {"lr": 2e-5}, True)
    assert "set 1" not in agents[0].events


def test_the_next_generation_is_in_slot_order_with_the_weights_and_values_of_the_plan() -> None:
    after = carry_out((birth(2, 2), birth(4, 0, 9e-5), birth(5, 3), birth(6, 0)), population())
    assert [agent.index for agent in after] == [2, 4, 5, 6]
    assert [agent.weight for agent in after] == ["weight of 2", "weight of 0", "weight of 3", "weight of 0"]
    assert [agent.values["lr"] for agent in after] == [lr_of(2), 9e-5, lr_of(3), lr_of(0)]


def test_the_last_child_of_a_parent_that_leaves_takes_over_its_object() -> None:
    agents = population()
    after = carry_out((birth(2, 2), birth(4, 0, 9e-5), birth(5, 3), birth(6, 0)), agents)
    assert after[3] is agents[0]
    assert after[2] is agents[3]
    assert after[1] is not agents[0]
    assert [event for event in agents[0].events if event.startswith("clone")] == ["clone 0 as 4"]


def test_a_parents_object_is_unchanged_until_its_last_clone_was_taken() -> None:
    agents = population()
    after = carry_out((birth(4, 0, 9e-5), birth(5, 0), birth(6, 0, 8e-5), birth(7, 0, 7e-5)), agents)
    assert agents[0].events[-5:] == ["clone 0 as 5", "set 5", "clone 0 as 6", "set 6", "set 7"]
    assert [agent.values["lr"] for agent in after] == [9e-5, 1e-5, 8e-5, 7e-5]


def test_no_object_appears_twice_and_nobody_alive_is_lost() -> None:
    for seed in range(100):
        agents = population()
        values = [Result(agent.index, (0.5 + seed % 3,), agent.hyperparameter_values()) for agent in agents]
        made = plan(values, seed, hp_config=HyperparameterConfig(lr=CONFIG["lr"]))
        after = carry_out(made.births, agents)
        assert len({id(agent) for agent in after}) == 4
        assert all(agent.alive for agent in after)
        assert all(agent in after for agent in agents if agent.alive)
        assert [(agent.index, agent.values) for agent in after] == [(b.index, b.hyperparameters) for b in made.births]


@pytest.mark.parametrize(
    "births",
    [
        (birth(1, 1), birth(4, 9), birth(5, 1), birth(6, 1)),
        (birth(1, 1), Birth(4, None, (), False, {"lr": 1e-5}), birth(5, 1), birth(6, 1)),
    ],
)
def test_a_plan_with_a_parent_from_elsewhere_is_refused_and_nothing_happens(births: tuple[Birth, ...]) -> None:
    agents = population()
    with pytest.raises(ConfigurationError, match="population="):
        carry_out(births, agents)
    assert agents[0].events == []


def test_a_plan_is_carried_out_once_and_only_on_its_own_population() -> None:
    made = (birth(1, 1), birth(4, 1), birth(5, 1), birth(6, 1))
    after = carry_out(made, population())
    with pytest.raises(ConfigurationError, match=r"population=\[1, 4, 5, 6\].*parents \[1\]"):
        carry_out(made, after)


def test_those_who_have_mutated_are_told_so_and_no_others() -> None:
    change = (Mutation("lr", 1e-5, 9e-5, 9.0),)
    births = (
        birth(1, 1),
        Birth(4, 1, change, False, {"lr": 9e-5}),
        birth(5, 2),
        Birth(6, 2, change, False, {"lr": 9e-5}),
    )
    assert [agent.num_hooked for agent in carry_out(births, population())] == [0, 1, 0, 1]
