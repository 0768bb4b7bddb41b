"""Which hyperparameters evolve, and within which bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import Any, TypeAlias

import numpy as np

from evollm.checks import finite_number, is_number_as_text, nearest_name
from evollm.errors import ConfigurationError

# A number, or one of the choices of a categorical parameter.
Value: TypeAlias = float | str

# Names of hyperparameters in other libraries, with the names here.
ALIASES = {"learning_rate": "lr", "rpo_alpha": "nll_alpha", "train_batch_size": "batch_size"}


def to_lower(names: Collection[str]) -> str:
    """Those of the named hyperparameters to lower after a divergence, such as "lr or beta"."""
    return " or ".join(name for name in ("lr", "beta") if name in names)


def rounded_factor(before: Value, after: Value) -> float | None:
    """Return after / before to 3 significant digits; None if one is no number, or `before` is 0."""
    if isinstance(before, int | float) and isinstance(after, int | float) and before:
        return float(f"{after / before:.3g}")
    return None


@dataclass(frozen=True, repr=False)
class RLParameter:
    """Bounds and mutation factors of one numeric hyperparameter, or the choices of a categorical one.

    The mutation of a number multiplies it, as the perturbation of population based training does (arXiv 1711.09846), so
    that lr and beta vary on the same logarithmic scale. The mutation of a categorical hyperparameter takes another
    choice.

    Args:
        min: Smallest value, above 0; None for a categorical parameter.
        max: Largest value.
        shrink_factor: Multiplier of a mutation downwards, between 0 and 1.
        grow_factor: Multiplier of a mutation upwards, above 1.
        dtype: `float`, or `int` for a whole number; the bounds of an `int` are whole numbers too.
        choices: At least two names, such as `("sigmoid", "ipo")` for `loss_type`, instead of bounds.

    Raises:
        ConfigurationError: If the bounds are reversed, equal or not above 0, a factor points the wrong way, a number
            is not finite, or there are both bounds and choices.
    """

    min: float | None = None
    max: float | None = None
    shrink_factor: float = 0.8
    grow_factor: float = 1.2
    dtype: type[float] | type[int] = float
    choices: Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Check the fields against each other and turn numpy scalars into Python numbers."""
        if self.choices is not None:
            self._check_choices()
            return
        if self.dtype is not float and self.dtype is not int:
            raise ConfigurationError("dtype", self.dtype, "must be float or int")
        for field in ("min", "max", "shrink_factor", "grow_factor"):
            object.__setattr__(self, field, finite_number(field, getattr(self, field)))
        self._check_bounds()
        if not 0 < self.shrink_factor < 1:
            raise ConfigurationError("shrink_factor", self.shrink_factor, "must lie between 0 and 1, both excluded")
        if self.grow_factor <= 1:
            raise ConfigurationError("grow_factor", self.grow_factor, "must be above 1")

    def __repr__(self) -> str:
        """Return the class name with the fields that are not at their defaults."""
        values = ((field, getattr(self, field.name)) for field in fields(self))
        given = {field.name: value for field, value in values if value != field.default}
        written = (f"{name}={value.__name__ if name == 'dtype' else repr(value)}" for name, value in given.items())
        return f"RLParameter({', '.join(written)})"

    def _check_choices(self) -> None:
        if self.min is not None or self.max is not None:
            raise ConfigurationError("choices", self.choices, "come instead of min and max: leave one of them out")
        names = () if isinstance(self.choices, str) or not isinstance(self.choices, Sequence) else self.choices
        if not all(isinstance(name, str) for name in names) or len(set(names)) < max(2, len(names)):
            raise ConfigurationError("choices", self.choices, "must be at least two different names")
        object.__setattr__(self, "choices", tuple(names))

    def _check_bounds(self) -> None:
        lowest, highest = self.bounds
        if lowest <= 0:
            fix = (
                "must be above 0: mutation multiplies and start values are drawn log-uniformly, so a value could never "
                "leave 0; write a small positive number"
            )
            raise ConfigurationError("min", self.min, fix)
        if lowest >= highest:
            fix = f"must be below max={highest!r}; swap reversed bounds, and leave a constant out of the config"
            raise ConfigurationError("min", self.min, fix)
        for field in ("min", "max"):
            bound = getattr(self, field)
            if self.dtype is int and bound != int(bound):
                raise ConfigurationError(field, bound, "must be a whole number because dtype is int")
            object.__setattr__(self, field, self.dtype(bound))

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest value of a number."""
        assert self.min is not None
        assert self.max is not None
        return self.min, self.max

    @property
    def extremes(self) -> tuple[Value, ...]:
        """The choices, or the smallest and the largest value; each drawn value is one of them or lies between them."""
        return tuple(self.choices) if self.choices is not None else self.bounds

    def clip(self, value: float) -> float:
        """Return the value within the bounds that is nearest to `value`, rounded if the dtype is int.

        Raises:
            ConfigurationError: If `value` is NaN.
        """
        lowest, highest = self.bounds
        if math.isnan(value):
            raise ConfigurationError("value", value, f"must be a number within [{lowest}, {highest}]")
        inside = min(max(value, lowest), highest)
        return round(inside) if self.dtype is int else float(inside)

    def sample(self, rng: np.random.Generator) -> Value:
        """Draw a value log-uniformly within the bounds, or one of the choices (one draw of `rng`)."""
        if self.choices is not None:
            return self.choices[int(rng.integers(len(self.choices)))]
        lowest, highest = self.bounds
        return self.clip(math.exp(rng.uniform(math.log(lowest), math.log(highest))))

    def at(self, fraction: float) -> Value:
        """Return the value at a fraction of the way from the smallest to the largest, on a logarithmic scale.

        Args:
            fraction: From 0 to 1. Of n choices each has a part of the length 1 / n.
        """
        if self.choices is not None:
            return self.choices[min(int(fraction * len(self.choices)), len(self.choices) - 1)]
        lowest, highest = map(math.log, self.bounds)
        return self.clip(math.exp(lowest + fraction * (highest - lowest)))

    def fraction_of(self, value: float) -> float:
        """Return how far a number is on the way from the smallest to the largest: the inverse of `at`, from 0 to 1."""
        lowest, highest = map(math.log, self.bounds)
        return (math.log(self.clip(value)) - lowest) / (highest - lowest)

    def between(self, first: Value, second: Value, weight: float) -> Value:
        """Return the weighted geometric mean of two numbers, within the bounds; of two choices the first."""
        if isinstance(first, str) or isinstance(second, str) or first == second:
            return first
        return self.clip(math.exp(weight * math.log(self.clip(first)) + (1 - weight) * math.log(self.clip(second))))

    def mutate(self, value: Value, rng: np.random.Generator) -> tuple[Value, float | None]:
        """Draw another choice, all equally likely, or multiply a number by the grow or the shrink factor.

        Both factors are equally likely; at a bound the factor that leads back inside is taken. The product is clipped
        to the bounds. An int changes by at least 1. Consumes one draw of `rng` whatever the value is.

        Returns:
            The new value, and the factor by which it changed: the declared factor, or, where the product was clipped or
            rounded, new / old to 3 significant digits; None for a choice.

        Raises:
            ConfigurationError: If `value` is not a finite number above 0, or not one of the choices.
        """
        if self.choices is not None:
            others = [choice for choice in self.choices if choice != value]
            return others[int(rng.integers(len(others)))], None
        value, (lowest, highest) = finite_number("value", value), self.bounds
        if value <= 0:
            raise ConfigurationError("value", value, f"cannot be multiplied; use one within [{lowest}, {highest}]")
        grows = bool(rng.integers(2))  # at a bound too, so that later draws do not depend on the value
        if value <= lowest or value >= highest:
            grows = value <= lowest
        factor = self.grow_factor if grows else self.shrink_factor
        proposal = value * factor
        if self.dtype is int:  # 2 x 1.2 would be rounded back to 2
            proposal = max(round(proposal), value + 1) if grows else min(round(proposal), value - 1)
        new = self.clip(proposal)
        return new, factor if new == value * factor else rounded_factor(value, new)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        if self.choices is not None:
            return {"choices": list(self.choices)}
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
        if "choices" in data:
            return cls(choices=data["choices"])
        return cls(**{**data, "dtype": int if data["dtype"] == "int" else float})


class HyperparameterConfig(Mapping[str, RLParameter]):
    """The hyperparameters that evolve, by name; an immutable mapping in the order of declaration.

    Example:
        >>> config = HyperparameterConfig(lr=RLParameter(min=1e-7, max=1e-4), beta=RLParameter(min=0.01, max=1.0))
        >>> config.names()
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

    def names(self) -> tuple[str, ...]:
        """The names in the order of declaration."""
        return tuple(self._parameters)

    def validate(
        self,
        values: Mapping[str, Any],
        known: Collection[str],
        check: Callable[[Mapping[str, Any]], object] | None = None,
    ) -> None:
        """Check the config against an agent, before training starts.

        Args:
            values: The agent's hyperparameters.
            known: The names of the hyperparameters that can change during a run.
            check: Raises a `ConfigurationError` for hyperparameters that no agent can have. It is called with every
                combination of choices, minima and maxima. A number between two valid ones must be valid too.

        Raises:
            ConfigurationError: If a name is not known, an agent's value is missing or outside its bounds, or evolution
                could draw values that no agent can have.
        """
        for name, parameter in self.items():
            if name not in known:
                nearest = nearest_name(name, known, ALIASES)
                hint = f"; the nearest known name is {nearest!r}" if nearest else ""
                names = ", ".join(sorted(known)) or "none"
                fix = f"is not a hyperparameter that can evolve{hint}; known are {names}"
                raise ConfigurationError(f"hp_config.{name}", parameter, fix)
            if name not in values:
                raise ConfigurationError(name, None, "the agent has no value for it; give it one or drop it here")
            _check_value(name, values[name], parameter)
        if check is not None:
            self._check_combinations(values, check)

    def _check_combinations(self, values: Mapping[str, Any], check: Callable[[Mapping[str, Any]], object]) -> None:
        """Refuse the first combination that evolution could draw and no agent can have."""

        def error_of(drawn: Mapping[str, Value]) -> ConfigurationError | None:
            try:
                check({**values, **drawn})
            except ConfigurationError as error:
                return error
            return None

        check(values)
        combinations = (
            dict(zip(self, drawn, strict=True)) for drawn in product(*(one.extremes for one in self.values()))
        )
        drawn = next((combination for combination in combinations if error_of(combination)), None)
        if drawn is None:
            return
        # The message names only the values that together cause the error.
        for name in self:
            fewer = {other: value for other, value in drawn.items() if other != name}
            drawn = fewer if error_of(fewer) else drawn
        error = error_of(drawn)
        assert error is not None
        entry = error.field if error.field in drawn else next(iter(drawn))
        others = "".join(f" with {name}={value!r}" for name, value in drawn.items() if name != entry)
        fix = f"evolution can draw this value{others}, but {error}; declare other choices or bounds"
        raise ConfigurationError(f"hp_config.{entry}", drawn[entry], fix)

    def sample(self, rng: np.random.Generator) -> dict[str, Value]:
        """Draw every hyperparameter within its bounds or from its choices; consumes one draw of `rng` for each."""
        # Sorted, so that the order of declaration does not change the draws.
        drawn = {name: self[name].sample(rng) for name in sorted(self)}
        return {name: drawn[name] for name in self}

    def sample_spread(self, count: int, rng: np.random.Generator) -> list[dict[str, Value]]:
        """Draw hyperparameters that are spread over the bounds: a Latin hypercube (McKay et al. 1979).

        The range of each hyperparameter is divided into `count` parts of equal length on a logarithmic scale, and each
        part has one of the values.

        Args:
            count: How many to draw.
            rng: Consumed by two draws for each hyperparameter.
        """
        columns = {name: (rng.permutation(count) + rng.random(count)) / count for name in sorted(self)}
        return [{name: self[name].at(float(columns[name][row])) for name in self} for row in range(count)]

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return the fields of every parameter as plain JSON values."""
        return {name: parameter.to_dict() for name, parameter in self.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Mapping[str, Any]]) -> HyperparameterConfig:
        """Read what `to_dict` wrote."""
        return cls(**{name: RLParameter.from_dict(fields) for name, fields in data.items()})


def _check_value(name: str, value: object, parameter: RLParameter) -> None:
    if parameter.choices is not None:
        if value not in parameter.choices:
            raise ConfigurationError(name, value, f"is not one of its choices {parameter.choices}; start with one")
        return
    if isinstance(value, str) and not is_number_as_text(value):
        raise ConfigurationError(name, value, "is a name and has no bounds: declare its choices, at least two names")
    number, (lowest, highest) = finite_number(name, value), parameter.bounds
    bounds = f"[{lowest!r}, {highest!r}]"
    if not lowest <= number <= highest:
        fix = f"lies outside its bounds {bounds}; start within them or widen the RLParameter"
        raise ConfigurationError(name, value, fix)
    if isinstance(value, int) and parameter.dtype is not int:
        fix = f"is an int, and a mutation would make it a float: declare RLParameter({lowest!r}, ..., dtype=int)"
        raise ConfigurationError(name, value, fix)
    if parameter.dtype is int and number != int(number):
        raise ConfigurationError(name, value, f"must be a whole number within {bounds} because its dtype is int")
