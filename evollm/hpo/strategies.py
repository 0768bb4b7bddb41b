"""The search strategies that can be given by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evollm.checks import nearest_name
from evollm.errors import ConfigurationError
from evollm.hpo.asha import ASHA
from evollm.hpo.grid_search import GridSearch
from evollm.hpo.multi_frequency_pbt import MultiFrequencyPBT
from evollm.hpo.optuna_search import OptunaSearch
from evollm.hpo.pb2 import PB2
from evollm.hpo.population_based_training import PopulationBasedTraining
from evollm.hpo.racing_search import Racing
from evollm.hpo.random_search import RandomSearch
from evollm.hpo.search import Search
from evollm.hpo.search_checks import check_search
from evollm.hpo.successive_halving import SuccessiveHalving
from evollm.hpo.tournament import TournamentSearch

# By name, as in `search: successive_halving` of a YAML file. The arguments of each class are settings of `evollm.tune`.
STRATEGIES: Mapping[str, type[Any]] = {
    "racing": Racing,
    "tournament": TournamentSearch,
    "successive_halving": SuccessiveHalving,
    "asha": ASHA,
    "pbt": PopulationBasedTraining,
    "pb2": PB2,
    "mf_pbt": MultiFrequencyPBT,
    "optuna": OptunaSearch,
    "random": RandomSearch,
    "grid": GridSearch,
}


def strategy_of(name: object) -> type[Any]:
    """Return the class with this name.

    Raises:
        ConfigurationError: No strategy has this name; the message lists the names.
    """
    if not isinstance(name, str) or name not in STRATEGIES:
        nearest = nearest_name(name, STRATEGIES) if isinstance(name, str) else None
        hint = f"; the nearest is {nearest!r}" if nearest else ""
        raise ConfigurationError("search", name, f"is no search{hint}; known are {', '.join(STRATEGIES)}")
    return STRATEGIES[name]


def search_of(search: object) -> Search:
    """Return the search itself, or one with default settings from its name.

    Raises:
        ConfigurationError: `search` is neither a search nor the name of one.
    """
    found: Any = strategy_of(search)() if isinstance(search, str) else search
    check_search(found)
    return found  # type: ignore[no-any-return]
