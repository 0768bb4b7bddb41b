"""Several sets of rows in one split: their weights, and which rows of each set an epoch has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from numbers import Real
from typing import TypeAlias

import numpy as np

from evollm.checks import number_hint
from evollm.data.samples import IntArray
from evollm.errors import ConfigurationError

Weights: TypeAlias = dict[str, float]
FIELD = "dataset_weights"


def checked_weights(weights: object) -> Weights | None:
    """The weight of each set, above 0 and finite; None without weights.

    Raises:
        ConfigurationError: It is no mapping of names to such numbers.
    """
    if weights is None:
        return None
    if not isinstance(weights, Mapping) or not weights:
        raise ConfigurationError(FIELD, weights, "must map the name of each set to its weight: {'helpful': 3, ...}")
    for name in weights:
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise ConfigurationError(FIELD, name, "the name of a set must be a text of one line")
    return {name: _checked_weight(name, weight) for name, weight in weights.items()}


def _checked_weight(name: str, weight: object) -> float:
    if isinstance(weight, Real) and not isinstance(weight, bool):
        try:
            number = float(weight)
        except OverflowError:
            number = math.inf
        if 0 < number < math.inf:
            return number
    fix = "must be a number above 0; leave a set out of data and weights to learn nothing from it"
    raise ConfigurationError(f"{FIELD}.{name}", weight, f"{fix}{number_hint(weight)}")


def check_sets(field: str, sets: object, weights: Weights) -> None:
    """Check that training data are the sets that have weights.

    Raises:
        ConfigurationError: They are no mapping, a set has no weight, or a weight has no set.
    """
    if not isinstance(sets, Mapping):
        raise ConfigurationError(field, type(sets).__name__, f"with {FIELD} it must map names to rows: {{name: rows}}")
    for name, weight in weights.items():
        if name not in sets:
            fix = f"is the weight of no set; the sets of {field} are {', '.join(map(str, sets)) or 'none'}"
            raise ConfigurationError(f"{FIELD}.{name}", weight, fix)
    for name, rows in sets.items():
        if name not in weights:
            raise ConfigurationError(f"{field}.{name}", type(rows).__name__, f"has no weight: add it to {FIELD}")


def check_names(field: str, sets: Mapping[str, object], weights: Weights) -> None:
    """Check that held-out data are some of the sets that have weights.

    Raises:
        ConfigurationError: There is none, or another one.
    """
    known = ", ".join(weights)
    if not sets:
        raise ConfigurationError(field, {}, f"has no set: give rows, or some of the sets {known}, or None")
    for name, rows in sets.items():
        if name not in weights:
            raise ConfigurationError(f"{field}.{name}", type(rows).__name__, f"is none of the sets, {known}")


def shares(sizes: Mapping[str, int], weights: Weights) -> dict[str, int]:
    """How many rows of each set an epoch has: as many as the sets have together, divided by weight.

    Remainders go to the largest fractions, of equal ones to the first.

    Args:
        sizes: The number of rows of each set.
        weights: The weight of each set.

    Raises:
        ConfigurationError: A weight is so small that an epoch has no row of its set.
    """
    # As they are written: 0.1 is a tenth.
    parts = {name: Fraction(repr(weights[name])) for name in sizes}
    total, whole = sum(sizes.values()), sum(parts.values())
    exact = {name: total * part / whole for name, part in parts.items()}
    found = {name: math.floor(share) for name, share in exact.items()}
    by_fraction = sorted(exact, key=lambda name: found[name] - exact[name])
    for name in by_fraction[: total - sum(found.values())]:
        found[name] += 1
    for name, share in found.items():
        if not share:
            fix = f"gives no row of the {total} of an epoch: raise it, or leave the set out"
            raise ConfigurationError(f"{FIELD}.{name}", weights[name], fix)
    return found


@lru_cache(maxsize=4)
def mixed_order(seed: int, epoch: int, sizes: Sequence[int], drawn: Sequence[int]) -> IntArray:
    """The rows of an epoch, (n,) positions in the sets one after the other.

    Each set is gone through in one permutation after the other, and an epoch goes on where the one before ended: no row
    of a set comes a second time before all others have come, over epochs too. The rows of an epoch are then shuffled.

    Args:
        seed: Seed of the order.
        epoch: The epoch, from 0.
        sizes: The number of rows of each set.
        drawn: How many rows of each set an epoch has.
    """
    starts = np.cumsum([0, *sizes[:-1]])
    parts = [
        start + _through(seed, number, size, epoch * count, count)
        for number, (start, size, count) in enumerate(zip(starts, sizes, drawn, strict=True))
    ]
    order: IntArray = np.random.default_rng([seed, epoch]).permutation(np.concatenate(parts))
    order.flags.writeable = False
    return order


def _through(seed: int, number: int, size: int, first: int, count: int) -> IntArray:
    """Rows `first` to `first + count` of the endless row of permutations of a set."""
    passes = range(first // size, -(-(first + count) // size))
    # The 1 sets these seeds apart from [seed, epoch]: numpy takes a missing number for 0.
    rows = [np.random.default_rng([seed, number, one, 1]).permutation(size) for one in passes]
    skipped = first - passes.start * size
    found: IntArray = np.concatenate(rows)[skipped : skipped + count]
    return found
