from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from evollm.errors import ConfigurationError, DivergedError
from evollm.hpo import Birth, Evaluation, HyperparameterConfig, Racing, Result, RLParameter, SearchPlan, SearchStart
from evollm.hpo.racing_search import spread
from evollm.hpo.search import SearchBudget
from evollm.hpo.search_checks import check_plan

VALUES = {"lr": 1e-3, "beta": 0.1}
CONFIG = HyperparameterConfig(lr=RLParameter(1e-5, 1e-1))
ROWS = 256


def started(search: Racing, size: int, budget: SearchBudget | None = None, rows: int = ROWS) -> SearchPlan:
    founders = [Birth.fresh(index, {**VALUES, "lr": 1e-4 * (index + 1)}) for index in range(size)]
    return search.start(SearchStart(founders, CONFIG, 8, budget, rows))


def told(search: Racing, plan: SearchPlan, fitnesses: Sequence[float], gaps: Sequence[float] | None = None):
    """The next plan; `gaps` are the means of the members' margins."""
    noise = np.random.default_rng(0).normal(size=(len(fitnesses), 64))
    results = [
        Result(
            birth.index,
            (fitness,),
            birth.hyperparameters,
            evaluation=None if gaps is None else Evaluation(noise[place] + gaps[place], np.zeros(64)),
        )
        for place, (birth, fitness) in enumerate(zip(plan.births, fitnesses, strict=True))
    ]
    made = search.tell(results)
    check_plan(made, results, {birth.index for birth in plan.births})
    return made


def indices(plan: SearchPlan) -> list[int]:
    return [birth.index for birth in plan.births]


def test_a_third_goes_on_at_each_rung_on_twice_as_many_rows_until_one_is_left() -> None:
    search = Racing()
    first = started(search, 8)
    assert (indices(first), first.steps, first.rows) == ([*range(8)], 8, 64)
    second = told(search, first, [0.1, 0.8, 0.2, 0.7, 0.3, 0.6, 0.4, 0.5])
    assert (indices(second), second.steps, second.rows) == ([1, 3, 5], 8, 128)
    assert [birth.elite for birth in second.births] == [True, False, False]
    third = told(search, second, [0.1, 0.2, 0.3])
    assert (indices(third), third.steps, third.rows) == ([5], None, None)


def test_rungs_lie_at_one_two_and_four_intervals_and_rows_end_at_all() -> None:
    search = Racing(reduction_factor=2, first_rows=100)
    plan = started(search, 16)
    seen = [(len(plan.births), plan.steps, plan.rows)]
    while plan.steps is not None:
        plan = told(search, plan, [float(-index) for index in indices(plan)])
        seen.append((len(plan.births), plan.steps, plan.rows))
    assert seen == [(16, 8, 100), (8, 8, 200), (4, 16, None), (2, 32, None), (1, None, None)]


def test_who_is_clearly_worse_leaves_though_there_is_a_place() -> None:
    fitnesses, gaps = [0.9, 0.8, 0.7, 0.1, 0.1, 0.1], [2.0, 1.99, 0.0, 0.0, 0.0, 0.0]
    for error_rate, kept in ((0.05, [0, 1]), (0.0, [0, 1, 2])):
        search = Racing(reduction_factor=2, error_rate=error_rate)
        assert indices(told(search, started(search, 6), fitnesses, gaps)) == kept


def test_the_best_by_fitness_goes_on_whatever_the_test_says() -> None:
    search = Racing(reduction_factor=2)
    assert indices(told(search, started(search, 4), [0.9, 0.8, 0.1, 0.1], [0.0, 2.0, 0.0, 0.0])) == [0, 1]


def test_who_has_diverged_leaves_and_equal_members_keep_their_order() -> None:
    search = Racing()
    assert indices(told(search, started(search, 6), [math.nan, 0.5, 0.5, 0.5, math.inf, 0.5])) == [1, 2]
    with pytest.raises(DivergedError):
        told(search, started(search, 4), [math.nan] * 4)


def test_heirs_take_free_places_and_begin_with_the_weights_of_the_best() -> None:
    search = Racing(heirs=2)
    plan = told(search, started(search, 8), [0.1, 0.8, 0.2, 0.7, 0.3, 0.6, 0.4, 0.5])
    assert indices(plan) == [1, 3, 5, 8, 9]
    for birth in plan.births[3:]:
        assert birth.parent == 1
        assert [one.name for one in birth.mutations] == ["lr"]
    assert plan.births[3].hyperparameters != plan.births[4].hyperparameters
    last = told(search, plan, [0.1, 0.2, 0.3, 0.9, 0.4])
    assert indices(last) == [8, 9, 10, 11]
    # Nobody begins beside the last one, which is trained to the end.
    small = Racing(heirs=2)
    assert indices(told(small, started(small, 3), [0.1, 0.3, 0.2])) == [1]


@pytest.mark.parametrize(
    ("runs", "founders", "kept"), [(1.25, 2, 1), (1.6, 3, 2), (2.1, 6, 2), (2.5, 8, 3), (3.0, 8, 4), (9.0, 8, 4)]
)
def test_a_budget_chooses_how_many_go_on_and_if_need_be_begin(runs, founders, kept) -> None:
    """64 steps a run, an evaluation on all rows costs 4 of them."""
    search = Racing()
    plan = started(search, 8, SearchBudget(runs * 64, 64, 4.0))
    assert len(plan.births) == founders
    spent, before = 0.0, 0
    at = 8
    counts = [founders]
    while plan.steps is not None:
        spent += len(plan.births) * (at - before + 4.0 * (plan.rows or ROWS) / ROWS)
        before, at = at, 2 * at
        plan = told(search, plan, [float(-index) for index in indices(plan)])
        counts.append(len(plan.births))
    spent += 64 - before + 4.0
    assert counts[1] == kept
    assert spent <= runs * 64


def test_where_not_even_two_fit_one_begins() -> None:
    plan = started(Racing(), 8, SearchBudget(1.2 * 64, 64, 4.0))
    assert (indices(plan), plan.steps, plan.rows) == ([0], None, None)


def test_founders_that_do_not_fit_are_those_nearest_to_others() -> None:
    config = HyperparameterConfig(lr=RLParameter(1e-5, 1e-1), loss_type=RLParameter(choices=("sigmoid", "ipo")))
    rates = [1e-3, 1e-5, 1.1e-3, 1e-1, 2e-5, 1e-4]
    founders = [Birth.fresh(index, {"lr": rate, "loss_type": "sigmoid"}) for index, rate in enumerate(rates)]
    assert [birth.index for birth in spread(founders, config, 4)] == [0, 1, 3, 5]
    founders[2] = Birth.fresh(2, {"lr": 1.1e-3, "loss_type": "ipo"})
    assert [birth.index for birth in spread(founders, config, 2)] == [0, 2]
    assert spread(founders, None, 2) == tuple(founders[:2])


def test_one_agent_bad_settings_and_nothing_to_mutate_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="there is one agent"):
        started(Racing(), 1)
    for setting in ({"reduction_factor": 1}, {"first_rows": 0}, {"error_rate": 0.5}, {"heirs": -1}, {"heirs": 0.5}):
        with pytest.raises(ConfigurationError, match=next(iter(setting))):
            Racing(**setting)
    with pytest.raises(ConfigurationError, match="an heir has nothing to mutate"):
        Racing(heirs=1).start(SearchStart([Birth.fresh(index, VALUES) for index in range(4)], None, 8))
