"""Successive halving: at each rung the worse half of the members leaves, until one is left.

Jamieson and Talwalkar 2016 (arXiv 1502.07943), with the rungs of Hyperband (arXiv 1603.06560). The first rung is after
`evo_steps` steps. At each rung the number of members is divided by `reduction_factor`, and the total number of steps is
multiplied by it, so that all rungs cost about the same; for a run of R steps, k rungs and a last member that is trained
to the end, give R / `reduction_factor` ** k as `evo_steps`. No member inherits weights, and nothing is random.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evollm.checks import whole_number
from evollm.errors import ConfigurationError
from evollm.hpo.search import Result, SearchPlan, SearchStart, best_first, reading_state


@dataclass
class SuccessiveHalving:
    """An `evollm.hpo.Search` that keeps the best 1 / `reduction_factor` of the members at each rung.

    Args:
        reduction_factor: The eta of the papers, at least 2.

    Raises:
        ConfigurationError: `reduction_factor` is below 2 or not an integer.
    """

    reduction_factor: int = 2

    def __post_init__(self) -> None:
        self.reduction_factor = whole_number("reduction_factor", self.reduction_factor, 2)

    def start(self, start: SearchStart) -> SearchPlan:
        """Begin with the founders, unchanged.

        Raises:
            ConfigurationError: There is only one founder, so that nothing can be selected.
        """
        if len(start.founders) == 1:
            raise ConfigurationError("search", self, "there is one agent: give several to choose from")
        self._interval, self._rung = start.interval, 0
        return SearchPlan(tuple(start.founders), start.interval)

    def tell(self, results: Sequence[Result]) -> SearchPlan:
        """Keep the best members; diverged members always leave.

        Raises:
            DivergedError: No member has a finite fitness.
        """
        kept = best_first(results)[: max(1, len(results) // self.reduction_factor)]
        births = [result.kept(elite=result is kept[0]) for result in results if result in kept]
        self._rung += 1
        steps = self._interval * (self.reduction_factor - 1) * self.reduction_factor ** (self._rung - 1)
        return SearchPlan(tuple(births), steps if len(births) > 1 else None)

    def state_dict(self) -> dict[str, Any]:
        """The number of rungs passed."""
        return {"rung": self._rung}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state of `state_dict`.

        Raises:
            CheckpointError: `state` is not such a state; the search is unchanged then.
        """
        with reading_state():
            self._rung = whole_number("rung", state["rung"], 0)
