"""The attributes of an agent in a checkpoint: only known fields of known types are read.

A checkpoint may come from a stranger, so the fields hold settings, hyperparameters and counters, and no model name,
loading argument, code, device or path.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from evollm.algorithms.settings import AgentSettings, Hyperparameters
from evollm.checks import boolean, optional_whole_number, whole_number
from evollm.errors import CheckpointError, ConfigurationError
from evollm.hpo.hyperparameters import HyperparameterConfig


@dataclass(frozen=True)
class SavedAttributes:
    """The attributes of a saved agent; `LLMAgent` documents each.

    Attributes:
        rng: State of the agent's generator.
    """

    index: int
    settings: AgentSettings
    hyperparameters: Hyperparameters
    hp_config: HyperparameterConfig | None
    fitness: list[float]
    steps: int
    num_tokens: int
    num_training_steps: int | None
    schedule_start: int
    diverged: bool
    reference_update_tracker: int
    rng: dict[str, Any]


def read_attributes(
    attributes: Mapping[str, Any],
    settings_class: type[AgentSettings],
    hyperparameters_class: type[Hyperparameters],
    source: object,
) -> SavedAttributes:
    """Read and check the attributes in a checkpoint.

    Args:
        attributes: The content of `attributes.pt`.
        settings_class: Dataclass of the settings of this algorithm's agents.
        hyperparameters_class: Dataclass of their hyperparameters.
        source: Where the checkpoint is, for the message.

    Raises:
        CheckpointError: A field is missing, unknown or invalid; the message names it.
    """
    try:
        hp_config = attributes["hp_config"]
        return SavedAttributes(
            index=whole_number("index", attributes["index"], 0),
            settings=_fields(settings_class, attributes["settings"], "settings"),
            hyperparameters=_fields(hyperparameters_class, attributes["hyperparameters"], "hyperparameters"),
            hp_config=None if hp_config is None else HyperparameterConfig.from_dict(hp_config),
            fitness=[_number("fitness", score) for score in attributes["fitness"]],
            steps=whole_number("steps", attributes["steps"], 0),
            num_tokens=whole_number("num_tokens", attributes["num_tokens"], 0),
            # Older checkpoints lack these two.
            num_training_steps=optional_whole_number("num_training_steps", attributes.get("num_training_steps"), 1),
            schedule_start=whole_number("schedule_start", attributes.get("schedule_start", 0), 0),
            diverged=boolean("diverged", attributes["diverged"]),
            reference_update_tracker=whole_number(
                "reference_update_tracker", attributes["reference_update_tracker"], 0
            ),
            rng=_generator_state(attributes["rng"]),
        )
    except (ConfigurationError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{source}: the attributes of its agent cannot be read: {error}") from error


def accepted_by(constructor: Callable[..., Any], values: AgentSettings | Hyperparameters) -> dict[str, Any]:
    """The fields of settings or hyperparameters that are parameters of a constructor, with their values."""
    accepted = inspect.signature(constructor).parameters
    return {name: value for name, value in dataclasses.asdict(values).items() if name in accepted}


def _fields(kind: Callable[..., Any], values: object, what: str) -> Any:
    """An object of a dataclass from its saved fields, which the dataclass checks itself."""
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not isinstance(values, Mapping) or not values.keys() <= known:
        strange = sorted(map(str, values.keys() - known)) if isinstance(values, Mapping) else values
        raise ConfigurationError(what, strange, f"is not known; an agent of this kind has {sorted(known)}")
    for name, value in values.items():
        if not _is_plain(value):
            fix = "must be a number, a text, a list or mapping of these, or None"
            raise ConfigurationError(f"{what}.{name}", value, fix)
    return kind(**values)


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(
            isinstance(name, str) and not isinstance(item, dict) and _is_plain(item) for name, item in value.items()
        )
    if isinstance(value, list | tuple):
        return all(item is not None and not isinstance(item, list | tuple) and _is_plain(item) for item in value)
    return value is None or isinstance(value, str | int | float | bool)


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigurationError(name, value, "must be a number")
    return float(value)


def _generator_state(value: Any) -> dict[str, Any]:
    """The state of a generator, tried on a new one."""
    np.random.default_rng().bit_generator.state = value
    return dict(value)
