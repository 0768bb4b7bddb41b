"""What every strategy with a name keeps to."""

from __future__ import annotations

import math
from typing import Any

import pytest
from simulated import CONFIG, NAMES, VALUES, begin, plans, saved, told

from evollm.errors import CheckpointError, ConfigurationError, DivergedError
from evollm.hpo import STRATEGIES, HyperparameterConfig, Result, RLParameter
from evollm.hpo.search import is_taken

DECISIONS = 7
# Strategies that fit a model at every decision are tried less often: once with each size and share of NaN.
SLOW = {"pb2": 12, "optuna": 12}
# Strategies that leave the founders' hyperparameters as they are.
FIXED = ("racing", "random", "successive_halving")


def assert_within_bounds(values: dict[str, Any], config: HyperparameterConfig = CONFIG) -> None:
    for name, one in config.items():
        if one.choices is not None:
            assert values[name] in one.choices
        else:
            assert type(values[name]) is one.dtype
            assert one.clip(values[name]) == values[name]
    assert values["max_grad_norm"] == VALUES["max_grad_norm"]


@pytest.mark.parametrize("name", NAMES)
def test_bounds_hold_and_no_agent_equals_another_whatever_is_told(name) -> None:
    for seed in range(SLOW.get(name, 200)):
        search, size = STRATEGIES[name](), 4 + seed % 6
        first = begin(search, size)
        for birth in first.births:
            assert_within_bounds(birth.hyperparameters)
        for plan, results in plans(search, first, range(DECISIONS), seed=seed, nan=0.05 * (seed % 12)):
            assert len(plan.births) <= size
            parents = {result.index: result for result in results}
            for place, birth in enumerate(plan.births):
                assert_within_bounds(birth.hyperparameters)
                is_parent = birth.parent not in (None, birth.index)
                assert not is_parent or math.isfinite(parents[birth.parent].fitness[0])
                if birth.parent is not None:
                    assert not is_taken(parents[birth.parent], birth.hyperparameters, plan.births[:place], results)
            fresh = [birth.hyperparameters for birth in plan.births if birth.parent is None]
            assert all(values not in fresh[:place] for place, values in enumerate(fresh))


@pytest.mark.parametrize("name", NAMES)
def test_plans_go_on_as_if_nothing_had_happened_from_a_state_at_any_decision(name) -> None:
    whole = STRATEGIES[name]()
    found = [(begin(whole), [])]
    states = [saved(whole)]
    for made in plans(whole, found[0][0], range(DECISIONS), seed=3, nan=0.1):
        found.append(made)
        states.append(saved(whole))
    for done, state in enumerate(states):
        resumed = STRATEGIES[name]()
        begin(resumed)
        resumed.load_state_dict(state)
        plan, before = found[done]
        results = {result.index: result for result in before}
        steps = [
            Result(
                birth.index,
                (0.0,),
                birth.hyperparameters,
                results[birth.parent].steps if birth.parent in results else 0,
            )
            for birth in plan.births
        ]
        after = [made for made, _ in plans(resumed, plan, range(done, DECISIONS), steps, seed=3, nan=0.1)]
        assert after == [made for made, _ in found[done + 1 :]]
        # start resets a search that has been used.
        assert begin(resumed) == found[0][0]
        assert saved(resumed) == states[0]


@pytest.mark.parametrize("name", [name for name in NAMES if name.values[0] != "random" and name.values[0] != "grid"])
def test_a_state_from_elsewhere_is_refused_and_changes_nothing(name) -> None:
    search = STRATEGIES[name]()
    begin(search)
    before = saved(search)
    for broken in ({}, {key: "other" for key in before}, dict.fromkeys(before)):
        with pytest.raises(CheckpointError, match="state of the search"):
            search.load_state_dict(broken)
        assert saved(search) == before


@pytest.mark.parametrize("name", NAMES)
def test_members_of_one_fitness_are_no_reason_to_fail(name) -> None:
    search = STRATEGIES[name]()
    plan, results = begin(search), []
    for decision in range(DECISIONS):
        if plan.steps is None:
            break
        results = [Result(one.index, (0.5,), one.hyperparameters, one.steps) for one in told(plan, results, decision)]
        plan = search.tell(results)


@pytest.mark.parametrize("name", NAMES)
def test_a_population_without_a_finite_fitness_raises(name) -> None:
    search = STRATEGIES[name]()
    plan = begin(search)
    if plan.steps is not None:
        with pytest.raises(DivergedError, match="none of the 8 agents"):
            search.tell([Result(birth.index, (math.nan,), birth.hyperparameters, 3) for birth in plan.births])


@pytest.mark.parametrize("name", NAMES)
def test_a_population_of_one_trains_on_or_is_refused(name) -> None:
    search, plan, refused = STRATEGIES[name](), None, ""
    try:
        plan = begin(search, 1)
    except ConfigurationError as error:
        refused = str(error)
    if plan is None:
        assert "agent" in refused
        return
    for made, _ in plans(search, plan, range(DECISIONS)):
        assert [birth.index for birth in made.births] == [0]


@pytest.mark.parametrize("name", [one for one in NAMES if one.values[0] not in FIXED])
def test_nothing_that_may_change_is_refused_where_something_must(name) -> None:
    with pytest.raises(ConfigurationError, match=r"hp_config=None.*hp_config=HyperparameterConfig"):
        begin(STRATEGIES[name](), config=None)


@pytest.mark.parametrize("name", NAMES)
def test_one_hyperparameter_with_two_choices_is_enough(name) -> None:
    """No more than two agents may begin alike; places that cannot differ are empty or kept."""
    config = HyperparameterConfig(loss_type=RLParameter(choices=("sigmoid", "ipo")))
    search = STRATEGIES[name]()
    for plan, _ in plans(search, begin(search, 4, config), range(DECISIONS)):
        assert 1 <= len(plan.births) <= 4
        assert_within_bounds(plan.births[-1].hyperparameters, config)
