"""The settings of `tune`, read off the signatures of what takes them, so that none is listed twice."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from evollm import training
from evollm.algorithms import Algorithm
from evollm.checks import number_hint, whole_hint
from evollm.errors import ConfigurationError
from evollm.hpo import STRATEGIES, Mutations, TournamentSelection

Settings: TypeAlias = dict[str, Any]

# Parameters that are no settings: `tune` itself passes them, or takes what they stand for by another name.
_FILLED_IN = frozenset(
    {"pop", "env", "tournament", "mutation", "observation_space", "action_space"}
    | {"actor_network", "model_name", "train_dataset", "test_dataset", "final_dataset", "population_size", "size"}
    | {"index", "clone", "wrap", "wrapper_cls", "wrapper_kwargs"}
)
_PLAIN: dict[str, type | tuple[type, ...]] = {
    "int": int,
    "float": (int, float),
    "bool": bool,
    "str": str,
    "Path": os.PathLike,
    "None": type(None),
}
_NAMES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "None": "null"}


def loop_of(algorithm: Algorithm) -> Callable[..., Any]:
    """The public function that runs an algorithm."""
    return getattr(training, algorithm.loop)  # type: ignore[no-any-return]


def parameters_of(algorithm: Algorithm) -> dict[str, str]:
    """The settings that the public pieces of a run take, with their annotations, by name."""
    found: dict[str, str] = {}
    for piece in (algorithm.gym, algorithm.agent, algorithm.agent.population, loop_of(algorithm)):
        found |= _annotations(piece)
    for strategy in STRATEGIES.values():
        found |= strategy_parameters(strategy)
    return {name: annotation for name, annotation in found.items() if name not in _FILLED_IN}


def strategy_parameters(strategy: type[Any]) -> dict[str, str]:
    """The settings that a search strategy takes, with their annotations, by name."""
    found = _annotations(strategy)
    # A tournament search is made of two objects with settings of their own.
    for name, settings in (("tournament", TournamentSelection), ("mutation", Mutations)):
        if name in found:
            found |= _annotations(settings)
    return {name: annotation for name, annotation in found.items() if name not in _FILLED_IN}


def taken_by(piece: Callable[..., Any], settings: Mapping[str, Any]) -> Settings:
    """The settings that are parameters of a piece."""
    names = _annotations(piece).keys() - _FILLED_IN
    return {name: value for name, value in settings.items() if name in names}


def default_of(piece: Callable[..., Any], name: str) -> Any:
    """What a piece takes for a parameter that is not given; None where it has no such parameter."""
    parameters = inspect.signature(piece).parameters
    return parameters[name].default if name in parameters else None


def check_types(settings: Mapping[str, Any], annotations: Mapping[str, str]) -> None:
    """Refuse values that their annotation does not allow, where it is one of plain types alone.

    Raises:
        ConfigurationError: The first of them.
    """
    for name, value in settings.items():
        wanted = [part.strip() for part in annotations.get(name, "").split("|")]
        if not all(part in _PLAIN for part in wanted):
            continue  # Whatever takes the value checks it.
        fits = any(isinstance(value, _PLAIN[part]) for part in wanted)
        if not fits or (isinstance(value, bool) and "bool" not in wanted):
            names = " or ".join(_NAMES.get(part, "a path") for part in wanted)
            hint = number_hint(value) if "float" in wanted else whole_hint(value) if "int" in wanted else ""
            if "None" in wanted and str(value).lower() == "none":
                hint = "; write null"
            raise ConfigurationError(name, value, f"must be {names}{hint}")


def _annotations(piece: Callable[..., Any]) -> dict[str, str]:
    """The annotations of a function's or constructor's parameters, by name."""
    parameters = inspect.signature(piece).parameters.values()
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {one.name: str(one.annotation) for one in parameters if one.kind not in kinds}
