"""Which public piece takes which setting, read off their signatures, so that no setting is listed twice."""

from __future__ import annotations

import dataclasses
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

# What `tune` itself passes to the pieces.
_FILLED_IN = frozenset(
    {"self", "args", "kwargs", "pop", "env", "tournament", "mutation", "observation_space", "action_space"}
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
    # What a tournament search is made of has settings of its own.
    for name, settings in (("tournament", TournamentSelection), ("mutation", Mutations)):
        if name in found:
            found |= {field.name: str(field.type) for field in dataclasses.fields(settings) if field.init}
    return {name: annotation for name, annotation in found.items() if name not in _FILLED_IN}


def taken_by(piece: Callable[..., Any], settings: Mapping[str, Any]) -> Settings:
    """The settings that are parameters of a piece."""
    if dataclasses.is_dataclass(piece):
        names = {field.name for field in dataclasses.fields(piece) if field.init}
    else:
        names = set(_annotations(piece))
    return {name: value for name, value in settings.items() if name in names - _FILLED_IN}


def default_of(piece: Callable[..., Any], name: str) -> Any:
    """What a piece takes for a parameter that is not given; None where it has no such parameter."""
    parameters = inspect.signature(piece).parameters
    return parameters[name].default if name in parameters else None


def check_types(settings: Mapping[str, Any], annotations: Mapping[str, str]) -> None:
    """Refuse values whose type their annotation does not allow, as far as it speaks of plain types alone.

    Raises:
        ConfigurationError: The first of them.
    """
    for name, value in settings.items():
        wanted = [part.strip() for part in annotations.get(name, "").split("|")]
        if not all(part in _PLAIN for part in wanted):
            continue  # The piece itself checks what is more than a number, a switch or a text.
        fits = any(isinstance(value, _PLAIN[part]) for part in wanted)
        if not fits or (isinstance(value, bool) and "bool" not in wanted):
            names = " or ".join(_NAMES.get(part, "a path") for part in wanted)
            hint = number_hint(value) if "float" in wanted else whole_hint(value) if "int" in wanted else ""
            if "None" in wanted and str(value).lower() == "none":
                hint = "; write null"
            raise ConfigurationError(name, value, f"must be {names}{hint}")


def _annotations(piece: Callable[..., Any]) -> dict[str, str]:
    function = piece.__init__ if inspect.isclass(piece) else piece
    parameters = inspect.signature(function).parameters.values()
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {one.name: str(one.annotation) for one in parameters if one.kind not in kinds}
