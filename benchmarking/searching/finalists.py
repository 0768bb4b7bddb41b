"""What is compared with the best configuration at the end: earlier weights, scaled adapters, merges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from evollm.hpo import PREFERENCE_FITNESSES, Evaluation
from evollm.models import AdapterState
from evollm.models.adapters.combining import combined, scaled
from evollm.models.shared_base import SharedBase
from searching.records import Array

FACTORS = (0.5, 0.75, 1.25, 1.5, 2.0)
# How, how many of the best, and times how much.
COMBINATIONS = (
    *(("cat", count, 1.0) for count in (2, 3, 4)),
    *((combination, 3, 1.0) for combination in ("linear", "svd", "ties", "dare_linear")),
    ("cat", 3, 1.5),
)
EARLIER = 3
# Members of the one whose answers are sampled.
ANSWERED = 4


@dataclass(frozen=True)
class Candidate:
    """Weights made without training.

    Attributes:
        kind: `earlier`, `scaled`, or a combination of `evollm.models.adapters.combining.combined`.
        members: The founders that it is made of.
        options: The factor, or the rung.
        state: The adapter.
    """

    kind: str
    members: Sequence[int]
    options: Mapping[str, Any]
    state: AdapterState = field(repr=False)

    @property
    def name(self) -> str:
        """For people."""
        return " ".join([self.kind, *(f"{value:g}" for value in self.options.values()), "of", *map(str, self.members)])

    @property
    def is_answered(self) -> bool:
        """Whether its answers are sampled."""
        return self.kind == "cat" and len(self.members) == ANSWERED

    def described(self) -> dict[str, Any]:
        """Without weights."""
        return {"kind": self.kind, "members": list(self.members), **self.options}


def candidates_of(
    selection: Array, base: SharedBase, actors: Sequence[str], kept: Sequence[Sequence[AdapterState]]
) -> list[Candidate]:
    """The candidates of a sweep.

    Args:
        selection: (founders, rungs, 2, pairs) log-ratios.
        base: The base.
        actors: The founders' adapters on it.
        kept: For each rung before the last the adapters of all founders.
    """
    scores = np.array([[PREFERENCE_FITNESSES["log_loss"].score(Evaluation(*few)) for few in row] for row in selection])
    ranked = [int(number) for number in np.argsort(scores[:, -1])[::-1]]
    best = ranked[0]
    found = [Candidate("scaled", [best], {"factor": factor}, scaled(base, actors[best], factor)) for factor in FACTORS]
    for combination, count, factor in COMBINATIONS:
        members = ranked[:count]
        weights = [factor / count] * count
        state = combined(base, [actors[member] for member in members], weights, combination)
        found.append(Candidate(combination, members, {} if factor == 1 else {"factor": factor}, state))
    earlier = [(score, rung, f) for f, row in enumerate(scores) for rung, score in enumerate(row[:-1])]
    for _, rung, founder in sorted(earlier, reverse=True)[:EARLIER]:
        found.append(Candidate("earlier", [founder], {"rung": rung}, kept[rung][founder]))
    return found
