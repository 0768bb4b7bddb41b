from __future__ import annotations

from random import Random

from evollm.execution.placement import placed
from evollm.hpo import Birth


def kept(index: int) -> Birth:
    return Birth(index, index, (), False, {})


def child(index: int, parent: int) -> Birth:
    return Birth(index, parent, (), False, {})


def test_founders_are_dealt_out_in_turn() -> None:
    founders = [Birth.fresh(index, {}) for index in (7, 3, 5, 4, 9)]
    assert placed(founders, {}, 2) == [0, 1, 0, 1, 0]
    assert placed(founders, {}, 1) == [0] * 5
    # More workers than members: the last ones hold none.
    assert placed(founders, {}, 8) == [0, 1, 2, 3, 4]


def test_kept_members_stay_and_children_go_where_there_is_room() -> None:
    holders = {0: 0, 1: 1, 2: 0, 3: 1}
    assert placed([kept(0), kept(1), kept(2), kept(3)], holders, 2) == [0, 1, 0, 1]
    # All are of worker 0: the kept ones stay, and the children move.
    assert placed([child(4, 0), kept(0), child(5, 2), kept(2)], holders, 2) == [1, 0, 1, 0]
    # An odd member more stays with the worker that has most of them.
    assert placed([kept(1), child(4, 1), child(5, 3)], holders, 2) == [1, 1, 0]
    # A race has ended for both members of worker 1, and one of worker 0's goes there.
    assert placed([kept(0), kept(2)], holders, 2) == [0, 1]


def test_members_that_learn_no_more_stay_and_do_not_count() -> None:
    holders = {0: 0, 1: 1, 2: 0, 3: 1}
    births = [kept(0), kept(1), kept(2), kept(3)]
    assert placed(births, holders, 2, stopped={1, 3}) == [0, 1, 1, 1]
    assert placed(births, holders, 2, stopped={0, 1, 2, 3}) == [0, 1, 0, 1]
    # A child of one that has stopped does learn.
    assert placed([child(4, 1), kept(0)], holders, 2, stopped={1}) == [1, 0]


def test_members_leave_a_closed_worker_and_the_others_stay() -> None:
    holders = {0: 0, 1: 1, 2: 2, 3: 0, 4: 1, 5: 2}
    births = [kept(index) for index in holders]
    assert placed(births, holders, 3, closed={1}) == [0, 0, 2, 0, 2, 2]
    # Those that learn no more leave, too.
    assert placed(births, holders, 3, stopped={1, 4, 5}, closed={1}) == [0, 2, 2, 0, 0, 2]
    assert placed([kept(0), kept(3)], holders, 2, closed={0}) == [1, 1]


def test_any_plan_is_balanced_and_moves_as_few_as_a_balance_allows() -> None:
    random = Random(0)
    for _ in range(300):
        count, size = random.randint(1, 5), random.randint(1, 9)
        holders = {index: random.randrange(count) for index in range(size)}
        births = [
            random.choice([kept(index), child(index + size, random.randrange(size)), Birth.fresh(index + size, {})])
            for index in range(random.randint(0, size))
        ]
        found = placed(births, holders, count)
        loads = [found.count(place) for place in range(count)]
        assert max(loads) - min(loads) <= 1
        homes = [None if birth.parent is None else holders[birth.parent] for birth in births]
        least, more = divmod(len(births), count)
        wishes = sorted((homes.count(place) for place in range(count)), reverse=True)
        most_that_stay = sum(min(wish, least + (rank < more)) for rank, wish in enumerate(wishes))
        assert sum(place == home for place, home in zip(found, homes, strict=True)) == most_that_stay
