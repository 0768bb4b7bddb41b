"""Random search (Bergstra and Bengio 2012): all founders are trained to the end, and the best of them is the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evollm.hpo.search import Result, SearchPlan, SearchStart


@dataclass
class RandomSearch:
    """An `evollm.hpo.Search` that changes nothing; a population draws the start values of its agents."""

    def start(self, start: SearchStart) -> SearchPlan:
        """Begin with the founders; there is no decision."""
        return SearchPlan(tuple(start.founders), None)

    def tell(self, results: Sequence[Result]) -> SearchPlan:
        """Keep all members."""
        return SearchPlan(tuple(result.kept() for result in results), None)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: there are no later plans."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing is restored."""
