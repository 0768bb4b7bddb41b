"""Which hyperparameters evolve, and within which bounds."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from evollm.checks import finite_number
from evollm.errors import ConfigurationError

FACTOR_DIGITS = 3


# What other libraries call them.
ALIASES = {"learning_rate": "lr", "rpo_alpha": "nll_alpha", "train_batch_size": "batch_size"}


@dataclass(frozen=True)
class RLParameter:
    """Bounds of one hyperparameter and how far one mutation moves it.

    A mutation multiplies, as the perturbation of population based training does (arXiv 1711.09846), so that an lr and a
    beta are varied on the same, logarithmic, scale.

    Args:
        min: Smallest value, above 0.
        max: Largest value.
        shrink_factor: Multiplier of a mutation downwards, between 0 and 1.
        grow_factor: Multiplier of a mutation upwards, above 1.
        dtype: `float`, or `int` for a whole number; the bounds of an `int` are whole numbers too.

    Raises:
        ConfigurationError: If the bounds are reversed, equal or not above 0, a factor points the wrong way, or a number
            is not finite.
    """

    min: float
    max: float
    shrink_factor: float = 0.8
    grow_factor: float = 1.2
    dtype: type[float] | type[int] = float

    def __post_init__(self) -> None:
        """Check the fields against each other and turn numpy scalars into Python numbers."""
        if self.dtype not in (float, int):
            raise ConfigurationError("dtype", self.dtype, "must be float or int")
        for field in ("min", "max", "shrink_factor", "grow_factor"):
            object.__setattr__(self, field, finite_number(field, getattr(self, field)))
        self._check_bounds()
        if not 0 < self.shrink_factor < 1:
            raise ConfigurationError("shrink_factor", self.shrink_factor, "must lie between 0 and 1, both excluded")
        if self.grow_factor <= 1:
            raise ConfigurationError("grow_factor", self.grow_factor, "must be above 1")

    def _check_bounds(self) -> None:
        if self.min <= 0:
            fix = (
                "must be above 0: mutation multiplies and start values are drawn log-uniformly, so a value could never "
                "leave 0; write a small positive number"
            )
            raise ConfigurationError("min", self.min, fix)
        if self.min >= self.max:
            fix = f"must be below max={self.max!r}; swap reversed bounds, and leave a constant out of the config"
            raise ConfigurationError("min", self.min, fix)
        for field in ("min", "max"):
            bound = getattr(self, field)
            if self.dtype is int and bound != int(bound):
                raise ConfigurationError(field, bound, "must be a whole number because dtype is int")
            object.__setattr__(self, field, self.dtype(bound))

    def clip(self, value: float) -> float:
        """Return the value within the bounds that is nearest to `value`, rounded if the dtype is int.

        Raises:
            ConfigurationError: If `value` is NaN.
        """
        if math.isnan(value):
            raise ConfigurationError("value", value, f"must be a number within [{self.min}, {self.max}]")
        inside = min(max(value, self.min), self.max)
        return round(inside) if self.dtype is int else float(inside)

    def sample(self, rng: np.random.Generator) -> float:
        """Draw a value log-uniformly within the bounds (one draw of `rng`)."""
        return self.clip(math.exp(rng.uniform(math.log(self.min), math.log(self.max))))

    def mutate(self, value: float, rng: np.random.Generator) -> tuple[float, float]:
        """Multiply `value` by the grow or the shrink factor, a fair coin says which, and clip it to the bounds.

        At a bound the direction that leads back inside is taken. An int changes by at least 1. Consumes one draw of
        `rng` whatever the value is.

        Returns:
            The new value, and the factor that it really changed by: the declared one, or new / old to 3 significant
            digits where clipping or rounding got in between.

        Raises:
            ConfigurationError: If `value` is not a finite number above 0.
        """
        if finite_number("value", value) <= 0:
            raise ConfigurationError("value", value, f"cannot be multiplied; use one within [{self.min}, {self.max}]")
        grows = bool(rng.integers(2))  # drawn at a bound too, so that later draws do not depend on the value
        if value <= self.min or value >= self.max:
            grows = value <= self.min
        factor = self.grow_factor if grows else self.shrink_factor
        proposal = value * factor
        if self.dtype is int:  # 2 x 1.2 rounds back to 2: such a parameter would never move
            proposal = max(round(proposal), value + 1) if grows else min(round(proposal), value - 1)
        new = self.clip(proposal)
        return new, factor if new == value * factor else float(f"{new / value:.{FACTOR_DIGITS}g}")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {
            "min": self.min,
            "max": self.max,
            "shrink_factor": self.shrink_factor,
            "grow_factor": self.grow_factor,
            "dtype": self.dtype.__name__,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RLParameter:
        """Read what `to_dict` wrote."""
        return cls(**{**data, "dtype": int if data["dtype"] == "int" else float})


class HyperparameterConfig(Mapping[str, RLParameter]):
    """The hyperparameters that evolve, by name; an immutable mapping in the order of declaration.

    Example:
        >>> config = HyperparameterConfig(lr=RLParameter(min=1e-7, max=1e-4), beta=RLParameter(min=0.01, max=1.0))
        >>> config.names
        ('lr', 'beta')

    Args:
        **parameters: The bounds of each.

    Raises:
        ConfigurationError: If one is not an `RLParameter`.
    """

    __slots__ = ("_parameters",)

    def __init__(self, **parameters: RLParameter) -> None:
        """Check that every value is an `RLParameter`."""
        for name, parameter in parameters.items():
            if not isinstance(parameter, RLParameter):
                raise ConfigurationError(name, parameter, "must be an RLParameter(min=..., max=...)")
        self._parameters = parameters

    def __getitem__(self, name: str) -> RLParameter:
        """Return the bounds of one hyperparameter."""
        return self._parameters[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._parameters)

    def __len__(self) -> int:
        """Return how many hyperparameters evolve."""
        return len(self._parameters)

    def __repr__(self) -> str:
        """Return the class name with the parameters by name."""
        return f"HyperparameterConfig({', '.join(f'{name}={parameter!r}' for name, parameter in self.items())})"

    @property
    def names(self) -> tuple[str, ...]:
        """The names in the order of declaration."""
        return tuple(self._parameters)

    def validate(self, values: Mapping[str, float], known: Collection[str]) -> None:
        """Check the config against an agent, before training starts.

        Args:
            values: The agent's hyperparameters.
            known: The names that the agent can change during a run.

        Raises:
            ConfigurationError: If a name is not known, or an agent's value is missing or outside its bounds.
        """
        for name, parameter in self.items():
            if name not in known:
                raise ConfigurationError(name, parameter, _unknown_name_fix(name, known))
            if name not in values:
                raise ConfigurationError(name, None, "the agent has no value for it; give it one or drop it here")
            _check_value(name, values[name], parameter)

    def sample(self, rng: np.random.Generator) -> dict[str, float]:
        """Draw every hyperparameter log-uniformly within its bounds; consumes one draw of `rng` for each."""
        drawn = {name: self[name].sample(rng) for name in sorted(self)}  # equal configs draw equally, however written
        return {name: drawn[name] for name in self}

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return the fields of every parameter as plain JSON values."""
        return {name: parameter.to_dict() for name, parameter in self.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Mapping[str, Any]]) -> HyperparameterConfig:
        """Read what `to_dict` wrote."""
        return cls(**{name: RLParameter.from_dict(fields) for name, fields in data.items()})


def _unknown_name_fix(name: str, known: Collection[str]) -> str:
    nearest = [ALIASES[name]] if ALIASES.get(name) in known else difflib.get_close_matches(name, known, 1, cutoff=0.0)
    hint = f"; the nearest known name is {nearest[0]!r}" if nearest else ""
    return f"is not a hyperparameter that can evolve{hint}; known are {', '.join(sorted(known)) or 'none'}"


def _check_value(name: str, value: object, parameter: RLParameter) -> None:
    number = finite_number(name, value)
    bounds = f"[{parameter.min!r}, {parameter.max!r}]"
    if not parameter.min <= number <= parameter.max:
        fix = f"lies outside its bounds {bounds}; start within them or widen the RLParameter"
        raise ConfigurationError(name, value, fix)
    if isinstance(value, int) and parameter.dtype is not int:
        fix = (
            f"is a whole number, and a mutation would break it: declare RLParameter({parameter.min!r}, ..., dtype=int)"
        )
        raise ConfigurationError(name, value, fix)
    if parameter.dtype is int and number != int(number):
        raise ConfigurationError(name, value, f"must be a whole number within {bounds} because its dtype is int")
