from __future__ import annotations

import math

import numpy as np
import pytest

from evollm.errors import ConfigurationError
from evollm.hpo import growing_subsets, survivors
from evollm.hpo.racing import paired_z
from evollm.hpo.scores import margin_over_std_terms

ROWS = 256


def accuracy_terms(margins: np.ndarray) -> np.ndarray:
    return np.heaviside(margins, 0.5)


def race(margins: np.ndarray, terms, *, error_rate: float, first: int = 32, factor: float = 2.0):
    """The members that are left of a race over (M, n) margins, and the share of the rows that were evaluated."""
    members, rows = margins.shape
    alive, before, cost = np.arange(members), 0, 0
    for count in growing_subsets(rows, first=first, factor=factor):
        cost += len(alive) * (count - before)
        found = np.stack([terms(margins[member, :count]) for member in alive])
        kept = survivors(found, rows=rows, rows_before=before, error_rate=error_rate, members=members)
        alive, before = alive[kept], count
    return alive.tolist(), cost / margins.size


def drawn(rng: np.random.Generator, shifts: np.ndarray) -> np.ndarray:
    """Margins with heavy tails, that share a part which says how hard a pair is."""
    return rng.standard_t(4, ROWS) + rng.standard_t(4, (len(shifts), ROWS)) + shifts[:, None]


@pytest.mark.parametrize("terms", [accuracy_terms, margin_over_std_terms])
@pytest.mark.parametrize(("members", "first", "factor"), [(2, 16, 1.3), (8, 32, 2.0)])
def test_a_best_member_is_dropped_no_more_often_than_asked_for_however_often_one_looks(
    terms, members: int, first: int, factor: float
) -> None:
    """All members are equal, the worst case; 300 races at 20 % may exceed it by three standard errors, 7 %."""
    rng = np.random.default_rng(0)
    races = [
        race(drawn(rng, np.full(members, 0.3)), terms, error_rate=0.2, first=first, factor=factor)[0]
        for _ in range(300)
    ]
    assert np.mean([0 not in left for left in races]) <= 0.2 + 3 * math.sqrt(0.2 * 0.8 / 300)
    # Of eight equal members some do leave: the bound holds for each of them.
    assert np.mean([len(left) < members for left in races]) > 0.05


def test_clear_losers_leave_early_and_the_best_stays() -> None:
    rng = np.random.default_rng(1)
    shifts = np.array([2.0, 1.9, 0.0, 0.0, 0.0, -0.5, -0.5, -1.0])
    races = [race(drawn(rng, shifts), margin_over_std_terms, error_rate=0.05) for _ in range(40)]
    assert all(0 in left for left, _ in races)
    assert all(set(left) <= {0, 1} for left, _ in races)
    assert np.mean([cost for _, cost in races]) < 0.5


def test_nobody_is_dropped_on_few_rows_or_where_all_are_equal() -> None:
    clear = np.stack([np.ones(15), np.zeros(15)])
    assert survivors(clear, rows=100).tolist() == [True, True]
    assert survivors(np.ones((3, 100)), rows=100).tolist() == [True] * 3
    assert survivors(np.ones((1, 100)), rows=100).tolist() == [True]
    assert survivors(np.stack([np.ones(40), np.zeros(40)]), rows=100).tolist() == [True, False]


def test_a_diverged_member_is_dropped_at_once_and_drops_nobody() -> None:
    terms = np.stack([np.full(10, math.nan), np.zeros(10), np.full(10, math.inf)])
    assert survivors(terms, rows=100).tolist() == [False, True, False]
    assert survivors(np.full((2, 20), math.nan), rows=100).tolist() == [False, False]


def test_the_statistic_of_six_differences() -> None:
    """Differences 1, 1, 1, 1, -1, 1 and the pseudo-differences 1, -1: six times 1 and twice -1.

    Mean 1/2, variance (8 - 8/4) / 7 = 6/7, t = (1/2) / sqrt(6/56) = 1.5275. With 7 degrees of freedom the one-sided
    p-value is 0.0852, of which the normal deviate is 1.371.
    """
    assert paired_z(np.array([1.0, 1.0, 1.0, 1.0, -1.0, 1.0])) == pytest.approx(1.371, abs=2e-3)
    assert paired_z(np.array([-2.0, -2.0, -2.0, -2.0, 2.0, -2.0])) == pytest.approx(-1.371, abs=2e-3)
    assert paired_z(np.zeros(6)) == 0.0


def test_subsets_grow_to_all_rows() -> None:
    assert list(growing_subsets(256)) == [32, 64, 128, 256]
    assert list(growing_subsets(100, first=16, factor=1.5)) == [16, 24, 36, 54, 81, 100]
    assert list(growing_subsets(20)) == [20]
    assert list(growing_subsets(4, first=1, factor=1.1)) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"rows": 9}, "rows_before=0"),
        ({"rows": 20, "rows_before": 10}, "rows_before=10"),
        ({"rows": 20, "error_rate": 0.5}, "error_rate=0.5"),
        ({"rows": 20, "members": 1}, "members=1"),
    ],
)
def test_a_race_that_makes_no_sense_is_refused(arguments: dict, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        survivors(np.zeros((2, 10)), **arguments)
