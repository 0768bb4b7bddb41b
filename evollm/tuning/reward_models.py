"""`reward_functions` and `judge` from plain data: a text stands for a reward model, by its name or folder."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from evollm.errors import ConfigurationError
from evollm.hpo import Judge
from evollm.models.reward_model import RewardModel
from evollm.names import check_known

# `model_config` could make a reader of a run folder run foreign code; see `evollm.models.loading.model_config`.
_SETTINGS = tuple(name for name in inspect.signature(RewardModel).parameters if name != "model_config")
_FIX = "names no reward model; other functions are Python: call evollm from Python"


def reward_functions_of(value: object) -> object:
    """Reward functions, with reward models in place of their names.

    Args:
        value: A text or a function, or a list of them, or a mapping of names to them; in a mapping also a mapping of
            `model` and further arguments of `RewardModel`.

    Raises:
        ConfigurationError: A text names no reward model.
    """
    field = "reward_functions"
    if isinstance(value, Mapping):
        return {str(name): _function(f"{field}.{name}", one) for name, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_function(field, one) for one in value]
    return _function(field, value)


def judge_of(value: object) -> object:
    """A judge, from a text, a function, or a mapping of the fields of `Judge`, whose `function` may be such a text.

    Raises:
        ConfigurationError: A text names no reward model, or a field is unknown or invalid.
    """
    if not isinstance(value, Mapping):
        return _function("judge", value)
    check_known(value, [one.name for one in dataclasses.fields(Judge)], {"model": "function"}, "judge")
    if "function" not in value:
        raise ConfigurationError("judge", dict(value), "needs function, the name or folder of a reward model")
    return Judge(**{**value, "function": _function("judge.function", value["function"])})


def _function(field: str, value: Any) -> Any:
    """A reward model from its name, or from a mapping of the arguments of `RewardModel`; anything else itself."""
    if not isinstance(value, str | Mapping):
        return value
    arguments = {"model": value} if isinstance(value, str) else value
    check_known(arguments, _SETTINGS, {}, field)
    if not isinstance(arguments.get("model"), str):
        raise ConfigurationError(field, dict(arguments), "needs model, the name or folder of a reward model")
    try:
        return RewardModel(**arguments)
    except ConfigurationError as error:
        if error.field in ("model", "model_name"):
            raise ConfigurationError(field, arguments["model"], f"{_FIX} ({error.fix})") from error
        raise ConfigurationError(f"{field}.{error.field}", error.value, error.fix) from error
