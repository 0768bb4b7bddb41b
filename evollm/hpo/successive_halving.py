"""Successive halving: all begin, the worse half leaves at each rung, and the best one goes on to the end.

Jamieson and Talwalkar 2016 (arXiv 1502.07943), with the rungs of Hyperband (arXiv 1603.06560): the first comes after
`evo_steps` steps, each later one after as many times the steps of the one before as fewer members are left. So every
rung costs about the same, and what is saved are the full runs of members that are behind early. Nobody inherits
weights, and nothing is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evollm.checks import whole_number
from evollm.errors import CheckpointError, ConfigurationError, DivergedError
from evollm.hpo.fitness import is_finite, rank
from evollm.hpo.search import Result, SearchPlan, SearchStart


@dataclass
class SuccessiveHalving:
    """An `evollm.hpo.Search` that keeps the best 1 / `reduction_factor` of the members at each rung.

    Args:
        reduction_factor: The eta of the papers, at least 2.

    Raises:
        ConfigurationError: It is smaller.
    """

    reduction_factor: int = 2

    def __post_init__(self) -> None:
        self.reduction_factor = whole_number("reduction_factor", self.reduction_factor, 2)

    def start(self, start: SearchStart) -> SearchPlan:
        """Begin with the founders as they are.

        Raises:
            ConfigurationError: There is one, which leaves nothing to choose from.
        """
        if len(start.founders) == 1:
            raise ConfigurationError("search", self, "there is one agent: give several to choose from")
        self._interval, self._rung = start.interval, 0
        return SearchPlan(tuple(start.founders), start.interval)

    def tell(self, results: Sequence[Result]) -> SearchPlan:
        """Keep the best members; whoever has diverged leaves in any case.

        Raises:
            DivergedError: No member has a finite fitness.
        """
        order = [
            position for position in rank([one.fitness for one in results]) if is_finite(results[position].fitness)
        ]
        if not order:
            raise DivergedError(f"none of the {len(results)} agents has a finite fitness; lower lr, or its upper bound")
        kept = order[: max(1, len(results) // self.reduction_factor)]
        births = [results[position].kept(elite=position == order[0]) for position in sorted(kept)]
        self._rung += 1
        steps = self._interval * (self.reduction_factor - 1) * self.reduction_factor ** (self._rung - 1)
        return SearchPlan(tuple(births), steps if len(births) > 1 else None)

    def state_dict(self) -> dict[str, Any]:
        """The rungs that are behind."""
        return {"rung": self._rung}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            CheckpointError: This is no such state; this object is as before then.
        """
        try:
            self._rung = whole_number("rung", state["rung"], 0)
        except (KeyError, TypeError, ConfigurationError) as error:
            raise CheckpointError(f"the state of the search is incomplete or from elsewhere: {error!r}") from error
