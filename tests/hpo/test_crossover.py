"""Children of two parents on plain data."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from simulated import CONFIG, VALUES, begin, plans

from evollm.errors import ConfigurationError
from evollm.hpo import (
    Birth,
    Mutations,
    Result,
    RLParameter,
    SearchPlan,
    SearchStart,
    TournamentSearch,
    TournamentSelection,
)
from evollm.hpo.search import is_taken
from evollm.hpo.search_checks import check_plan, check_start, describe_search

LOW = Result(0, (0.5,), {**VALUES, "lr": 1e-4, "batch_size": 2, "loss_type": "ipo"})
HIGH = Result(1, (0.6,), {**VALUES, "lr": 1e-2, "batch_size": 6, "loss_type": "hinge", "beta": 0.4})


def test_numbers_are_the_geometric_mean_and_choices_the_first_parents() -> None:
    child = LOW.crossed(2, HIGH, CONFIG)
    assert child.parents == (0, 1)
    assert child.hyperparameters["lr"] == pytest.approx(1e-3)
    assert child.hyperparameters["batch_size"] == round(math.sqrt(12)) == 3
    assert isinstance(child.hyperparameters["batch_size"], int)
    assert child.hyperparameters["loss_type"] == "ipo"
    # What may not change is the first parent's.
    assert child.hyperparameters["beta"] == LOW.hyperparameters["beta"]
    assert [mutation.name for mutation in child.mutations] == ["lr", "batch_size"]
    assert child.origin == "crossover with 1, lr: 1.0e-4 -(x10)-> 0.001, batch_size: 2 -(x1.5)-> 3"


def test_a_weight_moves_the_child_to_the_first_parent() -> None:
    assert LOW.crossed(2, HIGH, CONFIG, weight=0.75).hyperparameters["lr"] == pytest.approx(10**-3.5)
    assert RLParameter(1e-5, 1e-3).between(1e-4, 1e-1, 0.5) == pytest.approx(math.sqrt(1e-7))
    value = 3e-4 / 7
    assert RLParameter(1e-5, 1e-3).between(value, value, 0.3) == value
    for weight in (0.0, 1.0, math.nan):
        with pytest.raises(ConfigurationError, match="weight"):
            LOW.crossed(2, HIGH, CONFIG, weight=weight)
    with pytest.raises(ConfigurationError, match="two members"):
        LOW.crossed(2, LOW, CONFIG)


def test_a_birth_with_one_parent_is_written_as_ever_and_one_with_two_comes_back() -> None:
    child = LOW.crossed(2, HIGH, CONFIG, weight=0.25)
    text = json.dumps(child.to_dict(), allow_nan=False)
    assert Birth.from_dict(json.loads(text)) == child
    names = ["index", "parent", "mutations", "elite", "hyperparameters"]
    assert list(LOW.child(2).to_dict()) == names
    assert sorted(child.to_dict()) == sorted([*names, "second_parent", "weight"])


def test_settings_without_crossover_are_written_as_ever() -> None:
    assert "crossover" not in describe_search(TournamentSearch())["mutation"]
    assert describe_search(TournamentSearch(mutation=Mutations(crossover=0.5)))["mutation"]["crossover"] == 0.5
    for crossover in (-0.1, 1.1, math.nan, "often"):
        with pytest.raises(ConfigurationError, match="crossover"):
            Mutations(crossover=crossover)


@pytest.mark.parametrize("crossover", [0.4, 1.0])
def test_children_of_two_different_winners_lie_between_them_and_no_two_agents_are_equal(crossover: float) -> None:
    search = TournamentSearch(TournamentSelection(2, True, 8), Mutations(crossover=crossover))
    plan, children, crossed = begin(search), 0, 0
    for now, results in plans(search, plan, range(40), nan=0.2):
        members = {result.index: result for result in results}
        new = [birth for birth in now.births if birth.parent != birth.index]
        children += len(new)
        for place, birth in enumerate(now.births):
            if birth.second_parent is None:
                continue
            crossed += 1
            first, second = (members[index] for index in birth.parents)
            assert first.index != second.index
            assert all(math.isfinite(one.fitness[0]) for one in (first, second))
            # Only where another child was there already has one mutated as well.
            between = first.crossed(birth.index, second, CONFIG)
            is_first = not is_taken(first, between.hyperparameters, now.births[:place], results, second)
            assert (birth == between) == is_first
            assert CONFIG["lr"].clip(birth.hyperparameters["lr"]) == birth.hyperparameters["lr"]
        seen = [(frozenset(birth.parents), tuple(sorted(birth.hyperparameters.items()))) for birth in now.births]
        assert len(set(seen)) == len(seen)
    assert crossed / children == pytest.approx(crossover, abs=0.1)


def test_a_last_finite_agent_has_children_by_itself() -> None:
    search = TournamentSearch(TournamentSelection(2, True, 3), Mutations(crossover=1.0))
    start = begin(search, 3)
    results = [Result(one.index, (math.nan if one.index else 1.0,), one.hyperparameters) for one in start.births]
    births = search.tell(results).births
    assert [birth.parents for birth in births] == [(0,)] * len(births)


def test_two_children_of_the_same_parents_count_as_equal_in_either_order() -> None:
    values = LOW.crossed(2, HIGH, CONFIG).hyperparameters
    born = [LOW.crossed(2, HIGH, CONFIG)]
    assert is_taken(LOW, values, born, [LOW, HIGH], HIGH)
    assert is_taken(HIGH, values, born, [LOW, HIGH], LOW)
    assert not is_taken(LOW, values, born, [LOW, HIGH])
    assert not is_taken(LOW, values, [LOW.child(2, values)], [LOW, HIGH], HIGH)


def test_plans_with_impossible_parents_are_refused() -> None:
    good = LOW.crossed(2, HIGH, CONFIG)
    check_plan(SearchPlan((good,), 1), [LOW, HIGH], {0, 1})
    for bad in (
        replace(good, second_parent=7),
        replace(good, second_parent=0),
        replace(good, parent=None),
        replace(good, weight=1.0),
        replace(LOW.kept(), second_parent=1),
    ):
        with pytest.raises(ConfigurationError, match=r"parent|weight"):
            check_plan(SearchPlan((bad,), 1), [LOW, HIGH], {0, 1})
    founder = replace(Birth.fresh(0, LOW.hyperparameters), second_parent=1)
    with pytest.raises(ConfigurationError, match="first generation"):
        check_start(SearchPlan((founder,), 1), SearchStart([founder], CONFIG, 1))
