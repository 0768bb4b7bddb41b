"""The search strategies that have a name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evollm.checks import nearest_name
from evollm.errors import ConfigurationError
from evollm.hpo.search import Search, check_search
from evollm.hpo.successive_halving import SuccessiveHalving
from evollm.hpo.tournament import TournamentSearch

# What is given by its name, such as `search: successive_halving` in a file. The arguments of a class are settings of
# `evollm.tune`.
STRATEGIES: Mapping[str, type[Any]] = {"tournament": TournamentSearch, "successive_halving": SuccessiveHalving}


def strategy_of(name: object) -> type[Any]:
    """The class of a name.

    Raises:
        ConfigurationError: There is no such name; the message has the known ones.
    """
    if not isinstance(name, str) or name not in STRATEGIES:
        nearest = nearest_name(name, STRATEGIES) if isinstance(name, str) else None
        hint = f"; the nearest is {nearest!r}" if nearest else ""
        raise ConfigurationError("search", name, f"is no search{hint}; known are {', '.join(STRATEGIES)}")
    return STRATEGIES[name]


def search_of(search: object) -> Search:
    """A search from itself, or from its name.

    Raises:
        ConfigurationError: It is neither.
    """
    found: Any = strategy_of(search)() if isinstance(search, str) else search
    check_search(found)
    return found  # type: ignore[no-any-return]
