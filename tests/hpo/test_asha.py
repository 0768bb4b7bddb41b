from __future__ import annotations

import math

import pytest
from simulated import begin, plans

from evollm.errors import ConfigurationError
from evollm.hpo import ASHA, Result, SearchPlan


def tell(search: ASHA, plan: SearchPlan, *fitnesses: float) -> SearchPlan:
    return search.tell(
        [
            Result(birth.index, (fitness,), birth.hyperparameters, 3)
            for birth, fitness in zip(plan.births, fitnesses, strict=True)
        ]
    )


def indices(plan: SearchPlan) -> list[int]:
    return [birth.index for birth in plan.births]


def test_who_is_not_among_the_best_at_its_rung_leaves_and_others_begin_afresh() -> None:
    search = ASHA()
    plan = tell(search, begin(search, 4), 0.1, 0.8, 0.3, 0.4)
    # Two of four go on from the first rung.
    assert indices(plan) == [1, 3, 4, 5]
    assert [birth.parent for birth in plan.births] == [1, 3, None, None]
    # 1 and 3 are the first at the second rung; of the six at the first rung the best three go on: 0.8, 0.7 and 0.4.
    plan = tell(search, plan, 0.9, 0.5, 0.35, 0.7)
    assert indices(plan) == [1, 5, 6, 7]
    # 1 is between two rungs, 5 is worse than the only survivor of the second rung, 6 and 7 are at the first.
    plan = tell(search, plan, 0.2, 0.6, 0.1, 0.75)
    assert indices(plan) == [1, 7, 8, 9]


def test_with_a_largest_number_of_agents_it_is_successive_halving() -> None:
    search = ASHA(max_agents=8)
    plan = tell(search, begin(search, 8), *(0.1 * place for place in range(8)))
    assert indices(plan) == [4, 5, 6, 7]
    plan = tell(search, plan, *(0.1 * place for place in range(4)))
    assert indices(plan) == [6, 7]
    plan = tell(search, plan, 0.1, 0.2)
    assert indices(plan) == [6, 7], "no rung after three intervals"
    plan = tell(search, plan, 0.1, 0.2)
    assert indices(plan) == [7]


def test_a_run_has_no_more_agents_than_asked_for() -> None:
    search = ASHA(max_agents=11)
    found = list(plans(search, begin(search, 8), range(8), nan=0.2))
    assert max(birth.index for plan, _ in found for birth in plan.births) == 10
    assert len(found[-1][0].births) < 8


def test_the_best_member_goes_on_even_if_others_were_better_at_its_rung() -> None:
    search = ASHA(max_agents=2)
    plan = tell(search, begin(search, 2), 0.9, 0.1)
    assert indices(plan) == [0]
    search = ASHA(max_agents=4, reduction_factor=4)
    plan = tell(search, begin(search, 2), 0.9, 0.8)
    assert indices(plan) == [0, 2]
    # 0 diverges; 2 is the only one, and worse at its rung than 0 was.
    plan = tell(search, plan, math.nan, 0.1)
    assert indices(plan) == [2, 3]


def test_a_diverged_member_leaves_between_two_rungs() -> None:
    search = ASHA(reduction_factor=3, max_agents=4)
    plan = tell(search, begin(search, 4), 0.1, 0.9, 0.2, 0.3)
    plan = tell(search, plan, 0.5)
    assert indices(plan) == [1]


def test_of_equals_at_a_rung_the_first_go_on() -> None:
    search = ASHA()
    assert indices(tell(search, begin(search, 4), 0.5, 0.5, 0.5, 0.5)) == [0, 1, 4, 5]


@pytest.mark.parametrize("settings", [{"reduction_factor": 1}, {"max_agents": 0}, {"rand_seed": -1}])
def test_settings_that_cannot_work_are_refused(settings) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        ASHA(**settings)


def test_fewer_agents_than_founders_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="max_agents=4: is less than the 8 founders"):
        begin(ASHA(max_agents=4))
