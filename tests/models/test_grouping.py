from __future__ import annotations

import numpy as np
import pytest

from evollm.models.grouping import balanced_groups, padded_groups

SIZES = [7, 30, 2, 11, 5, 5, 18, 1]


@pytest.mark.parametrize("grouping", [balanced_groups, padded_groups])
@pytest.mark.parametrize("capacity", [1, 12, 31, 40, 1000])
@pytest.mark.parametrize("most", [None, 1, 3])
def test_every_item_is_in_one_group_that_is_not_too_large(grouping, capacity: int, most: int | None) -> None:
    groups = grouping(SIZES, capacity, most)
    assert sorted(item for group in groups for item in group) == list(range(len(SIZES)))
    for group in groups:
        sizes = [SIZES[item] for item in group]
        total = sum(sizes) if grouping is balanced_groups else max(sizes) * len(sizes)
        assert total <= capacity or len(group) == 1
        assert most is None or len(group) <= most


def test_groups_are_few_and_even() -> None:
    groups = balanced_groups(SIZES, 40)
    assert [sum(SIZES[item] for item in group) for group in groups] == [40, 39]


def test_padding_is_small_where_like_lengths_go_together() -> None:
    sizes = np.random.default_rng(0).integers(10, 200, size=64).tolist()
    groups = padded_groups(sizes, 1000)
    padded = sum(len(group) * max(sizes[item] for item in group) for group in groups)
    assert padded < 1.2 * sum(sizes)
