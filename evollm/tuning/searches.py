"""Which search the settings of `tune` ask for, and whether they fit it."""

from __future__ import annotations

from evollm.errors import ConfigurationError
from evollm.hpo import STRATEGIES, Search
from evollm.hpo.strategies import search_of, strategy_of
from evollm.tuning.parameters import Settings, strategy_parameters

# The search of a population unless settings say another.
SEARCH = "racing"
# Mutations take these as in AgileRL, and have no use for them; they are settings of agents and gym.
_NOT_OF_SEARCH = frozenset({"accelerator", "device"})


def default_search(given: Settings) -> str:
    """The name of the search without `search`: that whose settings are given, the first of several; else `SEARCH`."""
    own = {name: strategy_parameters(strategy).keys() & given.keys() for name, strategy in STRATEGIES.items()}
    own = {name: settings - {"rand_seed", *_NOT_OF_SEARCH} for name, settings in own.items()}
    return SEARCH if own[SEARCH] or not any(own.values()) else next(name for name in own if own[name])


def made_search(search: object, settings: Settings) -> Search:
    """The given search; if it is given by name, an instance made with the settings that its class takes."""
    if not isinstance(search, str):
        return search_of(search)
    strategy = strategy_of(search)
    found: Search = strategy(**{name: settings[name] for name in strategy_parameters(strategy) if name in settings})
    return found


def check_search_settings(search: object, given: Settings) -> None:
    """Refuse settings of searches other than `search`, since those settings would have no effect.

    Raises:
        ConfigurationError: A setting belongs to another search, or no search has the name.
    """
    wanted = strategy_parameters(strategy_of(search)) if isinstance(search, str) else {}
    for other, strategy in STRATEGIES.items():
        for setting in (strategy_parameters(strategy).keys() & given.keys()) - wanted.keys() - _NOT_OF_SEARCH:
            fix = f"is a setting of search={other!r}, which is not the one that is asked for: leave it out"
            raise ConfigurationError(setting, given[setting], fix)
