"""Which rows of several weighted sets an epoch has."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from evollm.data.mixing import check_sets, checked_weights, mixed_order, shares
from evollm.errors import ConfigurationError


def test_shares_are_in_proportion_and_add_up_to_the_rows_of_all_sets() -> None:
    assert shares({"a": 30, "b": 10}, {"a": 1.0, "b": 1.0}) == {"a": 20, "b": 20}
    assert shares({"a": 30, "b": 10}, {"a": 3.0, "b": 1.0}) == {"a": 30, "b": 10}
    assert shares({"a": 2, "b": 8}, {"b": 0.1, "a": 0.3}) == {"a": 8, "b": 2}
    # Of equal fractions the first is rounded up.
    assert shares({"a": 1, "b": 1, "c": 2}, {"a": 1.0, "b": 1.0, "c": 1.0}) == {"a": 2, "b": 1, "c": 1}
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = {str(number): int(size) for number, size in enumerate(rng.integers(50, 500, size=5))}
        weights = {name: float(weight) for name, weight in zip(sizes, rng.uniform(0.2, 5, size=5), strict=True)}
        found, total = shares(sizes, weights), sum(sizes.values())
        assert sum(found.values()) == total
        for name, count in found.items():
            assert abs(count - total * weights[name] / sum(weights.values())) < 1


def test_a_set_of_which_an_epoch_has_no_row_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"dataset_weights.b=0.001: gives no row of the 10 of an epoch"):
        shares({"a": 5, "b": 5}, {"a": 1.0, "b": 0.001})


@pytest.mark.parametrize(("sizes", "drawn"), [((7, 3), (2, 8)), ((5, 5, 5), (1, 13, 1)), ((4, 6), (4, 6))])
def test_no_row_comes_again_before_all_others_of_its_set_have_come(sizes, drawn) -> None:
    counts: Counter[int] = Counter()
    starts = np.cumsum([0, *sizes])
    for epoch in range(9):
        order = mixed_order(3, epoch, sizes, drawn)
        assert len(order) == sum(drawn)
        counts.update(order.tolist())
        for number, count in enumerate(drawn):
            rows = range(starts[number], starts[number + 1])
            assert sum(row in rows for row in order) == count
            times = [counts[row] for row in rows]
            assert sum(times) == (epoch + 1) * count
            assert max(times) - min(times) <= 1


def test_an_epoch_depends_on_seed_and_epoch_alone_and_its_sets_are_shuffled_together() -> None:
    first = mixed_order(0, 5, (50, 50), (70, 30)).tolist()
    mixed_order.cache_clear()
    assert mixed_order(0, 5, (50, 50), (70, 30)).tolist() == first
    assert mixed_order(1, 5, (50, 50), (70, 30)).tolist() != first
    assert mixed_order(0, 6, (50, 50), (70, 30)).tolist() != first
    # Sets of one size do not go through the same permutations.
    drawn = mixed_order(0, 0, (50, 50), (10, 10))
    assert {*drawn[drawn < 50]} != {*(drawn[drawn >= 50] - 50)}
    assert 0 < sum(row >= 50 for row in first[:40]) < 30


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([3, 1], r"dataset_weights=\[3, 1\]: must map the name of each set to its weight"),
        ({}, r"dataset_weights=\{\}: must map"),
        ({"a": 0, "b": 1}, r"dataset_weights.a=0: must be a number above 0"),
        ({"a": -1.0}, r"dataset_weights.a=-1.0: must be a number above 0"),
        ({"a": float("nan")}, r"dataset_weights.a=nan"),
        ({"a": float("inf")}, r"dataset_weights.a=inf"),
        ({"a": 10**400}, r"dataset_weights.a=1000"),
        ({"a": True}, r"dataset_weights.a=True"),
        ({"a": "3"}, r"dataset_weights.a='3': .*it is text, so take its quotation marks away"),
        ({3: 1.0}, r"dataset_weights=3: the name of a set must be a text of one line"),
        ({"a\nb": 1.0}, "the name of a set must be a text of one line"),
    ],
    ids=str,
)
def test_weights_that_cannot_be_are_refused_by_name(weights, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        checked_weights(weights)


def test_sets_and_weights_have_the_same_names() -> None:
    weights = checked_weights({"helpful": Fraction(3, 4), "harmless": np.float32(1)})
    assert weights == {"helpful": 0.75, "harmless": 1.0}
    check_sets("train_dataset", {"harmless": [], "helpful": []}, weights)
    with pytest.raises(
        ConfigurationError, match=r"train_dataset.other='list': has no weight: add it to dataset_weights"
    ):
        check_sets("train_dataset", {"harmless": [], "helpful": [], "other": []}, weights)
    with pytest.raises(
        ConfigurationError, match=r"dataset_weights.helpful=0.75: is the weight of no set; .* are harmless, helpfull"
    ):
        check_sets("train_dataset", {"harmless": [], "helpfull": []}, weights)
    with pytest.raises(
        ConfigurationError, match="train_dataset='list': with dataset_weights it must map names to rows"
    ):
        check_sets("train_dataset", [], weights)
