from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest

from evollm.errors import CheckpointError, ConfigurationError, DivergedError
from evollm.hpo import Birth, Mutation, Result, SearchPlan, SearchStart, SuccessiveHalving, TournamentSearch
from evollm.hpo.search_checks import check_plan, describe_search

VALUES = {"lr": 1e-3, "loss_type": "sigmoid"}


def results(fitnesses: Sequence[float]) -> list[Result]:
    return [Result(index, (fitness,), VALUES, 4) for index, fitness in enumerate(fitnesses)]


def begun(size: int, **settings: int) -> SuccessiveHalving:
    search = SuccessiveHalving(**settings)
    plan = search.start(SearchStart([Birth.fresh(index, VALUES) for index in range(size)], None, interval=3))
    assert (len(plan.births), plan.steps) == (size, 3)
    return search


def survivors(search: SuccessiveHalving, fitnesses: Sequence[float]) -> tuple[list[int], int | None]:
    plan = search.tell(results(fitnesses))
    check_plan(plan, results(fitnesses), range(len(fitnesses)))
    return [birth.index for birth in plan.births], plan.steps


def test_the_worse_half_leaves_at_each_rung_and_the_rungs_double() -> None:
    """Rungs after 3, 6, 12 steps: eight, four, two and one member."""
    search = begun(8)
    assert survivors(search, [0.1, 0.8, 0.2, 0.7, 0.3, 0.6, 0.4, 0.5]) == ([1, 3, 5, 7], 3)
    assert survivors(search, [0.1, 0.9, 0.8, 0.2]) == ([1, 2], 6)
    assert survivors(search, [0.1, 0.9]) == ([1], None)


def test_a_third_is_kept_with_a_factor_of_three_and_never_nobody() -> None:
    search = begun(7, reduction_factor=3)
    assert survivors(search, [0.1, 0.8, 0.2, 0.7, 0.3, 0.6, 0.4]) == ([1, 3], 6)
    assert survivors(search, [0.1, 0.2]) == ([1], None)


def test_who_is_kept_keeps_its_values_and_the_best_is_the_elite() -> None:
    births = begun(4).tell(results([0.1, 0.8, 0.9, 0.2])).births
    assert births == (Birth(1, 1, (), False, VALUES), Birth(2, 2, (), True, VALUES))


def test_who_has_diverged_leaves_at_the_next_rung() -> None:
    assert survivors(begun(4), [math.nan, 0.1, math.inf, math.nan]) == ([1], None)
    with pytest.raises(DivergedError):
        begun(4).tell(results([math.nan] * 4))


def test_halving_goes_on_at_its_rung_from_its_state_in_json() -> None:
    first, second = begun(8), begun(8)
    first.tell(results([0.1] * 8))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert survivors(second, [0.1] * 4) == survivors(first, [0.1] * 4) == ([0, 1], 6)
    for broken in ({}, {"rung": -1}, {"rung": "one"}):
        with pytest.raises(CheckpointError, match="state of the search"):
            second.load_state_dict(broken)
    # start resets the search.
    second.start(SearchStart([Birth.fresh(index, VALUES) for index in range(8)], None, 3))
    assert second.state_dict() == {"rung": 0}


@pytest.mark.parametrize("factor", [1, 0, 2.5, True])
def test_a_factor_that_halves_nothing_is_refused(factor) -> None:
    with pytest.raises(ConfigurationError, match="reduction_factor"):
        SuccessiveHalving(factor)


def test_a_child_says_what_it_does_not_share() -> None:
    parent = Result(3, (0.5,), VALUES)
    child = parent.child(7, {"lr": 2e-3, "loss_type": "ipo"})
    changes = (Mutation("lr", 1e-3, 2e-3, 2.0), Mutation("loss_type", "sigmoid", "ipo", None))
    assert child == Birth(7, 3, changes, False, {"lr": 2e-3, "loss_type": "ipo"})
    assert parent.child(7, {"lr": 1e-3}) == parent.child(7) == Birth(7, 3, (), False, VALUES)
    with pytest.raises(ConfigurationError, match=r"momentum.*lr, loss_type"):
        parent.child(7, {"momentum": 0.9})


def test_a_plan_comes_back_from_strict_json() -> None:
    parent = Result(3, (0.5,), VALUES)
    plan = SearchPlan((parent.kept(elite=True), parent.child(7, {"lr": 2e-3}), Birth.fresh(8, VALUES)), 5)
    assert SearchPlan.from_dict(json.loads(json.dumps(plan.to_dict(), allow_nan=False))) == plan


def test_a_search_is_described_by_its_name_and_the_settings_of_a_dataclass() -> None:
    assert describe_search(SuccessiveHalving(3)) == {"name": "SuccessiveHalving", "reduction_factor": 3}
    described = describe_search(TournamentSearch())
    assert (described["name"], described["tournament"]) == ("TournamentSearch", None)
    assert described["mutation"]["rl_hp"] == 0.7
    assert describe_search(object()) == {"name": "object"}


KEPT = Birth(1, 1, (), False, VALUES)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (None, "must return a SearchPlan"),
        (SearchPlan((), 1), "has no births"),
        (SearchPlan((KEPT,), 0), "search.steps=0"),
        (SearchPlan((KEPT,), 1.5), "search.steps=1.5"),
        (SearchPlan((KEPT, KEPT), 1), "gives two births the same index"),
        (SearchPlan((Birth.fresh(-1, VALUES),), 1), "search.index=-1"),
        (SearchPlan((Birth.fresh(1, VALUES),), 1), "agent 1.*has used"),
        (SearchPlan((Birth.fresh(6, VALUES),), 1), "agent 6.*has used"),
        (SearchPlan((Birth.fresh(8, {"lr": 1e-3}),), 1), "agent 8.*a value for each of lr, loss_type"),
        (SearchPlan((Birth(8, 5, (), False, VALUES),), 1), "agent 8.*parent 5.*not a member"),
        (SearchPlan((Birth(8, 1, (), True, VALUES),), 1), "agent 8.*elite is for a member that is kept"),
        (SearchPlan((Birth(1, 1, (), False, {**VALUES, "lr": 9e-3}),), 1), "agent 1.*kept with other values"),
    ],
)
def test_a_plan_that_no_lineage_could_tell_is_refused(plan, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check_plan(plan, results([0.1, 0.2]), {0, 1, 6})
