"""Which worker holds which member."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from evollm.hpo import Birth


def placed(
    births: Sequence[Birth],
    holders: Mapping[int, int],
    count: int,
    stopped: Collection[int] = frozenset(),
    closed: Collection[int] = frozenset(),
) -> list[int]:
    """Divide the members of a plan among workers, so that little moves and all have about as many.

    The numbers of members that learn differ by at most one. Kept members and children stay with their (first) parent
    as far as that lets them, kept members before children. The result depends on the arguments alone, so that processes
    that plan by themselves plan alike.

    Args:
        births: The members, in the order of the plan.
        holders: The worker of each present member, by index.
        count: The number of workers, numbered from 0.
        stopped: Indices of members that learn no more: kept ones stay where they are, and don't count.
        closed: Workers that take no members, not all of them; their members leave.

    Returns:
        The worker of each birth, in the order of the births.
    """
    homes = [None if birth.parent is None else holders.get(birth.parent) for birth in births]
    homes = [None if home in closed else home for home in homes]
    kept = [birth.parent == birth.index for birth in births]
    found: dict[int, int] = {}
    for number, (birth, home) in enumerate(zip(births, homes, strict=True)):
        if kept[number] and birth.index in stopped and home is not None:
            found[number] = home
    going = [number for number in range(len(births)) if number not in found]
    wishes: list[list[int]] = [[] for _ in range(count)]
    for number in sorted(going, key=lambda number: not kept[number]):
        home = homes[number]
        if home is not None:
            wishes[home].append(number)
    taking = [place for place in range(count) if place not in closed]
    least, more = divmod(len(going), len(taking))
    # The places above the least number go to the workers that most members want to stay with.
    by_wish = sorted(taking, key=lambda place: -len(wishes[place]))
    room = [least if place in taking else 0 for place in range(count)]
    for place in by_wish[:more]:
        room[place] += 1
    learners = [wishing[: room[place]] for place, wishing in enumerate(wishes)]
    found |= {number: place for place, staying in enumerate(learners) for number in staying}
    for number in going:
        if number not in found:
            open_places = [place for place in range(count) if len(learners[place]) < room[place]]
            found[number] = min(open_places, key=lambda place: len(learners[place]))
            learners[found[number]].append(number)
    return [found[number] for number in range(len(births))]
