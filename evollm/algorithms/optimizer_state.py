"""An optimizer's state in a checkpoint: checked and loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from evollm.algorithms.optimizers import OPTIMIZERS, Form, OptimizerSettings
from evollm.algorithms.row_optimizer import check_equal_progress
from evollm.checks import finite_number
from evollm.errors import CheckpointError, ConfigurationError

# Key under which bitsandbytes nests the tensors of a parameter's state.
_NESTED = "__bnb_optimizer_quant_state__"


def check_state(state: object, optim: str, groups: Sequence[Sequence[nn.Parameter]], source: object) -> None:
    """Check that a saved state is an optimizer's for these parameters.

    Args:
        state: The `state_dict` of a checkpoint.
        optim: The optimizer's name.
        groups: The parameters of each parameter group.
        source: Where the checkpoint is, for the message.

    Raises:
        CheckpointError: A part is missing, of another type or of another shape.
    """
    kind, parameters = OPTIMIZERS[optim], [parameter for group in groups for parameter in group]
    numbers = iter(range(len(parameters)))
    expected_groups = [[next(numbers) for _ in group] for group in groups]
    try:
        found: Any = state
        known = found["state"].keys() <= set(range(len(parameters)))
        if not known or [list(group["params"]) for group in found["param_groups"]] != expected_groups:
            raise ValueError("it is for other parameters")
        for group in found["param_groups"]:
            for name in kind.counters:
                finite_number(name, group[name])
        for number, values in found["state"].items():
            flat = {name: value for name, value in values.items() if name != _NESTED} | values.get(_NESTED, {})
            forms, expected = {name: _form(value) for name, value in flat.items()}, kind.forms(parameters[number])
            # A parameter that has made no step has no state.
            if forms and forms != expected:
                raise ValueError(f"parameter {number} has {forms}, and needs {expected}")
        if kind.package != "bitsandbytes":
            check_equal_progress([found["state"].get(number, {}) for number in range(len(parameters))])
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{source}: the optimizer's state cannot be used: {error}") from error


def _form(value: Any) -> Form:
    return ((), False) if isinstance(value, int) else (tuple(value.shape), value.dtype == torch.uint8)


def load_state(optimizer: torch.optim.Optimizer, optim: str, state: Mapping[str, Any]) -> None:
    """Load the state of a checkpoint; learning rates, betas and the like stay the optimizer's own."""
    counters = OPTIMIZERS[optim].counters
    own = [
        {name: value for name, value in group.items() if name not in ("params", *counters)}
        for group in optimizer.param_groups
    ]
    groups = [{**group, **options} for group, options in zip(state["param_groups"], own, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": groups})


def check_same_optimizer(saved: OptimizerSettings, own: OptimizerSettings, source: object) -> None:
    """Check that the state of an agent with the saved settings is one for an agent with its own settings.

    Args:
        saved: The settings of the agent whose state is in a checkpoint.
        own: The settings of the agent that is to have it.
        source: Where the checkpoint is, for the message.

    Raises:
        CheckpointError: The optimizer or the parameter groups are others.
    """
    other = None
    if saved.optim != own.optim:
        other = "optim"
    elif saved.uses_loraplus != own.uses_loraplus:
        other = "loraplus_lr_ratio"
    if other is not None:
        then, now = getattr(saved, other), getattr(own, other)
        raise CheckpointError(
            f"{source} holds the state of an optimizer with {other}={then!r}, and the agent has {other}={now!r}: "
            f"build the agent with {other}={then!r}, or leave the state out by load_optimizer=False"
        )


def check_replaceable_weights(optimizer: torch.optim.Optimizer) -> None:
    """Check that the weights can be replaced while the optimizer keeps its state.

    Raises:
        ConfigurationError: The state of a schedule-free optimizer holds weights of its own.
    """
    if any("z" in values for values in optimizer.state.values()):
        fix = "the optimizer's state is of the agent's present weights: give True, or load into a new agent"
        raise ConfigurationError("load_optimizer", False, fix)


def mean_state(first: Mapping[str, Any], second: Mapping[str, Any], weight: float) -> dict[str, Any]:
    """The optimizer's state of an agent whose weights are `weight` * the first's + (1 - `weight`) * the second's.

    It is the first agent's, but a schedule-free optimizer's own weights, z, are such a mean too.

    Raises:
        ConfigurationError: The second agent has no z, since it has made no step.
    """
    states = dict(first["state"])
    for number, values in first["state"].items():
        if "z" in values:
            other = second["state"].get(number, {}).get("z")
            if other is None:
                fix = "has made no step, so that its schedule-free optimizer has no weights for a mean: set crossover=0"
                raise ConfigurationError("second_parent", "its optimizer", fix)
            states[number] = {**values, "z": torch.lerp(other, values["z"], weight)}
    return {**first, "state": states}
