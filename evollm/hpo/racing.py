"""Which members of a population are clearly worse than another, from scores row by row on growing subsets of the rows.

Members race as in Maron and Moore (1994), "Hoeffding races": after each subset those that have been shown to be worse
leave, and the rest are evaluated on more rows. The test of two members is a paired t-test of their terms on the same
rows. Looking at the data several times would find differences where there are none, so each look spends only its share
of the error rate (Lan and DeMets 1983, "Discrete sequential boundaries for clinical trials", here with spending that is
linear in the number of rows).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from evollm.checks import finite_number, whole_number
from evollm.errors import ConfigurationError
from evollm.hpo.fitness import FloatArray

# On fewer rows nobody is dropped, since the t-test's normal approximation does not hold for skewed terms.
FEWEST_ROWS = 16


def survivors(
    terms: FloatArray, *, rows: int, rows_before: int = 0, error_rate: float = 0.05, members: int | None = None
) -> NDArray[np.bool_]:
    """Say which members may still be the best after a look at the terms of the first n rows.

    Over all looks of a race a best member is dropped with a probability of at most `error_rate`: each look tests each
    other member against it at the level error_rate x (n - rows_before) / rows / (members - 1), and these add up to
    `error_rate`. A member whose terms are not all finite is dropped.

    Args:
        terms: (M, n) contribution of each row to each member's score, larger is better: `NamedFitness.terms`.
        rows: Rows of the whole split; the last look has n = rows.
        rows_before: n of the look before, 0 at the first one. With fewer than 16 rows nothing is tested, and what a
            look did not spend is lost.
        error_rate: Largest probability that a best member is dropped in the whole race, in (0, 0.5).
        members: Members at the first look, None: M. Pass it at later looks, where only survivors are left.

    Returns:
        (M,) True for those that may be the best; all False if no member's terms are finite.

    Raises:
        ConfigurationError: The numbers of rows do not grow, or the error rate is not in (0, 0.5).
    """
    if terms.ndim != 2:  # noqa: PLR2004
        raise ConfigurationError("terms.shape", terms.shape, "must be (M, n)")
    count, seen = terms.shape
    if not 0 <= whole_number("rows_before", rows_before, 0) < seen <= whole_number("rows", rows, 1):
        raise ConfigurationError("rows_before", rows_before, f"must be below the {seen} rows of terms, at most {rows}")
    if not 0 < finite_number("error_rate", error_rate) < 0.5:  # noqa: PLR2004
        raise ConfigurationError("error_rate", error_rate, "must be between 0 and 0.5")
    finite = np.asarray(np.isfinite(terms).all(axis=1))
    others = (count if members is None else whole_number("members", members, count)) - 1
    if seen < FEWEST_ROWS or not others:
        return finite
    threshold = -NormalDist().inv_cdf(error_rate * (seen - rows_before) / rows / others)
    kept: NDArray[np.bool_] = finite.copy()
    for member in np.flatnonzero(finite):
        rivals = terms[finite] - terms[member]
        kept[member] = all(paired_z(differences) < threshold for differences in rivals)
    return kept


def paired_z(differences: FloatArray) -> float:
    """The t statistic of paired differences as a normal deviate of the same one-sided p-value.

    Two pseudo-differences at plus and minus the largest |difference| are added, which hardly matters among many rows,
    and gives a few equal differences a finite statistic. The deviate is Wallace's approximation (1959, "Bounds on
    normal approximations to Student's and the chi-square distributions"), z = (8f + 1) / (8f + 3) sqrt(f log(1 + t^2 /
    f)) for f degrees of freedom.

    Args:
        differences: (n,) finite.

    Returns:
        z, 0 if all differences are 0.
    """
    largest = float(np.abs(differences).max())
    if largest == 0:
        return 0.0
    values = np.concatenate([differences / largest, [1.0, -1.0]])
    freedom = len(values) - 1
    t = float(values.mean()) / (float(values.std(ddof=1)) / math.sqrt(len(values)))
    z = (8 * freedom + 1) / (8 * freedom + 3) * math.sqrt(freedom * math.log1p(t * t / freedom))
    return math.copysign(z, t)


def growing_subsets(rows: int, *, first: int = 32, factor: float = 2.0) -> Sequence[int]:
    """The numbers of rows of a race's looks: `first`, then `factor` times as many, up to all rows.

    Raises:
        ConfigurationError: `first` is below 1, or `factor` not above 1.
    """
    whole_number("rows", rows, 1)
    looks = [min(rows, whole_number("first", first, 1))]
    if not finite_number("factor", factor) > 1:
        raise ConfigurationError("factor", factor, "must be above 1")
    while looks[-1] < rows:
        looks.append(min(rows, max(looks[-1] + 1, round(looks[-1] * factor))))
    return looks
