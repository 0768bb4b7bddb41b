"""What a checkpoint says of an agent, read by a list of fields into plain values.

A checkpoint may come from somebody else: it says how an agent learns, and can name neither a model nor arguments to
load one with, nor code, a device or a path.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from evollm.algorithms.settings import AgentSettings, Hyperparameters
from evollm.errors import CheckpointError, ConfigurationError
from evollm.hpo.hyperparameters import HyperparameterConfig


@dataclass(frozen=True)
class SavedAttributes:
    """The attributes of a saved agent.

    Attributes:
        algorithm: Of which it is.
        index: Its number in its population.
        settings: What no mutation changes.
        hyperparameters: What evolution may change.
        hp_config: Which of them evolve.
        fitness: Its scores, oldest first.
        steps: Batches that it has learnt from.
        num_tokens: Tokens that it has learnt from.
        diverged: Whether it has stopped learning.
        reference_update_tracker: How often its reference has followed its actor.
        rng: State of its generator.
    """

    algorithm: str
    index: int
    settings: AgentSettings
    hyperparameters: Hyperparameters
    hp_config: HyperparameterConfig | None
    fitness: list[float]
    steps: int
    num_tokens: int
    diverged: bool
    reference_update_tracker: int
    rng: dict[str, Any]


def read_attributes(
    attributes: Mapping[str, Any],
    settings_class: type[AgentSettings],
    hyperparameters_class: type[Hyperparameters],
    source: object,
) -> SavedAttributes:
    """The attributes of an agent from the plain data of its checkpoint.

    Args:
        attributes: What the checkpoint holds.
        settings_class: The kind of settings that an agent of this algorithm has.
        hyperparameters_class: Likewise.
        source: Where the checkpoint is, for the message.

    Raises:
        CheckpointError: A field is missing, not known, or holds what it cannot hold; the message names it.
    """
    try:
        hp_config = attributes["hp_config"]
        return SavedAttributes(
            algorithm=_text("algorithm", attributes["algorithm"]),
            index=_count("index", attributes["index"]),
            settings=_fields(settings_class, attributes["settings"], "settings"),
            hyperparameters=_fields(hyperparameters_class, attributes["hyperparameters"], "hyperparameters"),
            hp_config=None if hp_config is None else HyperparameterConfig.from_dict(hp_config),
            fitness=[_number("fitness", score) for score in attributes["fitness"]],
            steps=_count("steps", attributes["steps"]),
            num_tokens=_count("num_tokens", attributes["num_tokens"]),
            diverged=_truth("diverged", attributes["diverged"]),
            reference_update_tracker=_count("reference_update_tracker", attributes["reference_update_tracker"]),
            rng=_generator_state(attributes["rng"]),
        )
    except (ConfigurationError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{source}: the attributes of its agent cannot be read: {error}") from error


def accepted_by(constructor: Callable[..., Any], values: AgentSettings | Hyperparameters) -> dict[str, Any]:
    """The fields of settings or hyperparameters that a constructor takes; the others stand at their defaults."""
    accepted = inspect.signature(constructor).parameters
    return {name: value for name, value in dataclasses.asdict(values).items() if name in accepted}


def _fields(kind: Callable[..., Any], values: object, what: str) -> Any:
    """An object of a class of settings, whose own checks see every value."""
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not isinstance(values, Mapping) or not values.keys() <= known:
        strange = sorted(map(str, values.keys() - known)) if isinstance(values, Mapping) else values
        raise ConfigurationError(what, strange, f"is not known; an agent of this kind has {sorted(known)}")
    for name, value in values.items():
        if not _is_plain(value):
            raise ConfigurationError(f"{what}.{name}", value, "must be a number, a text, a list of these, or None")
    return kind(**values)


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(item is not None and not isinstance(item, list | tuple) and _is_plain(item) for item in value)
    return value is None or isinstance(value, str | int | float | bool)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ConfigurationError(name, value, "must be a text")
    return value


def _truth(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ConfigurationError(name, value, "must be True or False")
    return value


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigurationError(name, value, "must be a whole number of at least 0")
    return value


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigurationError(name, value, "must be a number")
    return float(value)


def _generator_state(value: Any) -> dict[str, Any]:
    """A state that a numpy generator takes."""
    np.random.default_rng().bit_generator.state = value
    return dict(value)
