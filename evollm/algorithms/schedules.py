"""The learning rate's schedule: the formulas of transformers, as a factor of an agent's evolving `lr`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from evollm.checks import finite_number, nearest_name, whole_number
from evollm.errors import ConfigurationError, brief

# Schedules that follow a metric, and no step count.
_BY_METRIC = frozenset({"reduce_lr_on_plateau", "greedy"})
_FORMULAS: dict[str, Any] = {
    kind.value: formula for kind, formula in TYPE_TO_SCHEDULER_FUNCTION.items() if kind.value not in _BY_METRIC
}
# Parameters of the formulas that are no `lr_scheduler_kwargs`.
_FILLED_IN = frozenset({"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"})


@dataclass(frozen=True)
class LearningRateSchedule:
    """The schedule of an agent's learning rate; `AgentArguments` documents each field."""

    lr_scheduler_type: str = "constant"
    lr_scheduler_kwargs: Mapping[str, Any] | None = None
    warmup_ratio: float = 0.0
    warmup_steps: float = 0

    def __post_init__(self) -> None:
        name = self.lr_scheduler_type
        if not isinstance(name, str) or name in _BY_METRIC:
            fix = f"must be the name of a schedule over steps: {', '.join(_FORMULAS)}"
            raise ConfigurationError("lr_scheduler_type", name, fix)
        if name not in _FORMULAS:
            fix = f"is not known; the nearest is {nearest_name(name, _FORMULAS)!r}, known are {', '.join(_FORMULAS)}"
            raise ConfigurationError("lr_scheduler_type", name, fix)
        # transformers' SchedulerType is a str, too: a checkpoint may hold plain texts only.
        object.__setattr__(self, "lr_scheduler_type", next(known for known in _FORMULAS if known == name))
        self._check_kwargs()
        ratio = float(finite_number("warmup_ratio", self.warmup_ratio))
        if not 0 <= ratio <= 1:
            raise ConfigurationError("warmup_ratio", ratio, "must be a share of the steps, from 0 to 1")
        object.__setattr__(self, "warmup_ratio", ratio)
        steps = finite_number("warmup_steps", self.warmup_steps)
        steps = steps if 0 < steps < 1 else whole_number("warmup_steps", steps, 0)
        object.__setattr__(self, "warmup_steps", steps)
        for field in ("warmup_ratio", "warmup_steps"):
            if name == "constant" and getattr(self, field):
                fix = "has no effect with lr_scheduler_type='constant': use 'constant_with_warmup'"
                raise ConfigurationError(field, getattr(self, field), fix)

    def _check_kwargs(self) -> None:
        """Refuse arguments that the formula does not have, and values that a checkpoint cannot hold."""
        given, field = self.lr_scheduler_kwargs, "lr_scheduler_kwargs"
        if given is None:
            return
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            raise ConfigurationError(field, given, "must be a mapping such as {'min_lr_rate': 0.1}, or None")
        known = [] if self.lr_scheduler_type == "constant" else [*_parameters(self.lr_scheduler_type) - _FILLED_IN]
        unknown = sorted(given.keys() - set(known))
        if unknown:
            takes = f"takes {sorted(known)}" if known else "takes none"
            raise ConfigurationError(field, unknown, f"are not known: {self.lr_scheduler_type!r} {takes}")
        for name, value in given.items():
            if not isinstance(value, str | int | float | None):
                raise ConfigurationError(f"{field}[{name!r}]", value, "must be a number, a text or None")
        object.__setattr__(self, field, dict(given))

    @property
    def is_constant(self) -> bool:
        """Whether the rate is `lr` at every step."""
        return self.lr_scheduler_type == "constant"

    @property
    def depends_on_total(self) -> bool:
        """Whether the rate at a step depends on the number of all steps."""
        if 0 < self.warmup_steps < 1 or (self.warmup_ratio and not self.warmup_steps):
            return True
        stable = (self.lr_scheduler_kwargs or {}).get("num_stable_steps")
        return "num_training_steps" in _parameters(self.lr_scheduler_type) and stable is None

    def factor(self, lr: float, step: int, num_training_steps: int | None) -> float:
        """The factor of the learning rate at one step.

        Args:
            lr: The rate that the factor multiplies.
            step: Steps done before this one.
            num_training_steps: Number of all steps; needed if `depends_on_total`.

        Raises:
            ConfigurationError: The formula does not allow `lr_scheduler_kwargs`, alone or with this `lr`.
        """
        if self.is_constant:
            return 1.0
        kwargs = dict(self.lr_scheduler_kwargs or {})
        # The formula takes one of the two, and warns of both.
        total = None if kwargs.get("num_stable_steps") is not None else num_training_steps
        share = self.warmup_steps if 0 < self.warmup_steps < 1 else 0 if self.warmup_steps else self.warmup_ratio
        warmup = math.ceil(share * (num_training_steps or 0)) if share else int(self.warmup_steps)
        # Some formulas have an absolute last rate, so the factor depends on `lr`.
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
        try:
            schedule: Any = get_scheduler(self.lr_scheduler_type, optimizer, warmup, total, kwargs)
            return float(schedule.lr_lambdas[0](step))
        except (TypeError, ValueError, ArithmeticError) as error:
            fix = f"cannot be used for {self.lr_scheduler_type!r} and lr={lr}: {brief(str(error))}"
            raise ConfigurationError("lr_scheduler_kwargs", self.lr_scheduler_kwargs, fix) from error


def _parameters(name: str) -> set[str]:
    return set(inspect.signature(_FORMULAS[name]).parameters)
