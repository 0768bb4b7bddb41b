from __future__ import annotations

import math

import pytest
from simulated import begin, founders, plans

from evollm.errors import ConfigurationError
from evollm.hpo import MultiFrequencyPBT, Result, SearchPlan

VALUES = [birth.hyperparameters for birth in founders(8)]


def tell(search: MultiFrequencyPBT, *fitnesses: float) -> SearchPlan:
    return search.tell([Result(i, (fitness,), VALUES[i], 3) for i, fitness in enumerate(fitnesses)])


def begun(*frequencies: int) -> MultiFrequencyPBT:
    """Sub-populations of the founders 0 to 3 and 4 to 7."""
    search = MultiFrequencyPBT(frequencies)
    begin(search)
    return search


def test_each_sub_population_evolves_at_its_own_interval() -> None:
    search = begun(1, 3)
    for decision in (1, 2, 3):
        # None of the others is good enough to migrate.
        plan = tell(search, 0.9, 0.8, 0.7, 0.6, *(0.5, 0.4, 0.3, 0.2) if decision < 3 else (0.95, 0.4, 0.3, 0.2))
        kept = {birth.index for birth in plan.births if birth.parent == birth.index}
        assert kept >= {0, 1}
        assert (7 in kept) == (decision < 3)
        search._groups = {i: i // 4 for i in range(8)}


def test_the_worst_are_children_of_the_best_of_their_own_sub_population() -> None:
    plan = tell(begun(1, 2), 0.1, 0.8, 0.3, 0.4, 0.2, 0.2, 0.2, 0.2)
    child = plan.births[-1]
    assert [birth.index for birth in plan.births] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert (child.index, child.parent) == (8, 1)
    assert {mutation.name for mutation in child.mutations} == {"lr", "batch_size", "loss_type"}
    assert [birth.index for birth in plan.births if birth.elite] == [1]


def test_a_migrant_of_a_steadier_sub_population_is_a_perturbed_copy_while_the_original_lives_on() -> None:
    plan = tell(begun(1, 2), 0.1, 0.8, 0.3, 0.4, 0.9, 0.2, 0.2, 0.2)
    worst, migrated = plan.births[-2:]
    assert [birth.index for birth in plan.births] == [1, 3, 4, 5, 6, 7, 8, 9]
    assert (worst.parent, migrated.parent) == (1, 4)
    assert {mutation.name for mutation in migrated.mutations} == {"lr", "batch_size", "loss_type"}


def test_a_migrant_of_a_faster_sub_population_takes_the_values_of_the_best_here() -> None:
    search = begun(1, 2)
    tell(search, 0.1, 0.8, 0.3, 0.4, 0.2, 0.2, 0.2, 0.2)
    search._groups = {i: i // 4 for i in range(8)}
    plan = tell(search, 0.5, 0.6, 0.8, 0.9, 0.1, 0.7, 0.3, 0.2)
    migrated = plan.births[-1]
    assert (migrated.parent, migrated.hyperparameters) == (3, VALUES[5])
    # 7 stood just above the worst of its sub-population, 4.
    assert not {4, 7} & {birth.index for birth in plan.births}


def test_a_sub_population_that_diverged_as_a_whole_begins_again_from_the_best_of_the_others() -> None:
    plan = tell(begun(1, 2), *[math.nan] * 4, 0.2, 0.9, 0.2, 0.2)
    assert [birth.parent for birth in plan.births] == [4, 5, 6, 7, 5, 5, 5, 5]
    assert all(birth.mutations for birth in plan.births[4:])


def test_a_search_ends_near_the_best_value() -> None:
    search = MultiFrequencyPBT()
    *_, (plan, _) = plans(search, begin(search), range(60))
    best = next(birth for birth in plan.births if birth.elite)
    assert abs(math.log10(best.hyperparameters["lr"]) + 3) < 0.15


@pytest.mark.parametrize("frequencies", [(), (2, 2), (4, 1), (0, 1), "14", 3])
def test_frequencies_that_cannot_work_are_refused(frequencies) -> None:
    with pytest.raises(ConfigurationError, match="frequencies"):
        MultiFrequencyPBT(frequencies)


def test_a_population_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"population=5: is too small for 3 sub-populations.*give 6 agents"):
        begin(MultiFrequencyPBT((1, 2, 4)), 5)
