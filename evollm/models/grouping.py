"""Division of samples into passes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def balanced_groups(sizes: Sequence[int], capacity: int, most: int | None = None) -> list[list[int]]:
    """Divide items into as few groups as the capacity allows, of about the same total size.

    The largest items are placed first, each into the lightest group (Graham 1969, "longest processing time"), so that
    no group is a small remainder.

    Args:
        sizes: (n,) size of each item, for example a pair's tokens.
        capacity: Largest total size of a group; a larger item has a group of its own.
        most: Most items in a group; None: no bound.

    Returns:
        The positions of each group's items, in increasing order.
    """
    order = np.argsort(-np.asarray(sizes), kind="stable")
    count = max(-(-sum(min(size, capacity) for size in sizes) // capacity), -(-len(sizes) // (most or len(sizes))))
    while True:
        groups: list[list[int]] = [[] for _ in range(count)]
        totals = [0] * count
        for item in order:
            open_groups = [number for number in range(count) if most is None or len(groups[number]) < most]
            lightest = min(open_groups, key=lambda number: (totals[number], number))
            groups[lightest].append(int(item))
            totals[lightest] += sizes[item]
        if all(total <= capacity or len(group) == 1 for total, group in zip(totals, groups, strict=True)):
            return [sorted(group) for group in groups if group]
        count += 1


def padded_groups(
    lengths: Sequence[int] | NDArray[np.int64], capacity: int, most: int | None = None
) -> list[list[int]]:
    """Divide items that are padded to the longest item of their group; items of similar length share a group.

    Args:
        lengths: (n,) length of each item, or (n, k) lengths of its k parts, each of which is padded separately.
        capacity: Largest padded size of a group: its number of items times the longest length, summed over parts; a
            longer item has a group of its own.
        most: Most items in a group; None: no bound.

    Returns:
        The positions of each group's items, in increasing order.
    """
    parts = np.asarray(lengths).reshape(len(lengths), -1)
    groups: list[list[int]] = [[]]
    for item in np.argsort(-parts.sum(axis=1), kind="stable"):
        size = len(groups[-1]) + 1
        longest = int(parts[[*groups[-1], item]].max(axis=0).sum())
        if groups[-1] and (size * longest > capacity or len(groups[-1]) == most):
            groups.append([])
        groups[-1].append(int(item))
    return [sorted(group) for group in groups]
