"""Mutation of one child: one hyperparameter is multiplied by a factor or takes another choice, or nothing changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, InitVar, asdict, dataclass
from typing import Any

import numpy as np

from evollm.checks import boolean, finite_number, whole_number
from evollm.errors import ConfigurationError
from evollm.foreign import MUTATIONS, MUTATIONS_ORDER, explains_construction
from evollm.hpo.hyperparameters import HyperparameterConfig, Value


@explains_construction(MUTATIONS, MUTATIONS_ORDER)
@dataclass(frozen=True)
class Mutations:
    """Settings of the mutation of hyperparameters.

    Everything after `rand_seed` is accepted so that calls written for AgileRL run. evollm mutates hyperparameters only,
    and an elite always passes unmutated: other mutations must stay off, and their settings are ignored. All but the
    first two are keyword arguments.

    Args:
        no_mutation: Relative weight of a child with its parent's hyperparameters.
        rl_hp: Relative weight of a child with one hyperparameter changed.
        rand_seed: Seed of the random draws.
        crossover: Probability that a child has two parents, the winners of two tournaments: its adapter is the mean of
            theirs and its values lie between theirs (`Result.crossed`). Such a child does not mutate as well.
        architecture: Has to be 0.
        new_layer_prob: Not used.
        parameters: Has to be 0.
        activation: Has to be 0.
        mutation_sd: Not used.
        mutate_elite: Has to be False.
        device: Not used.
        accelerator: Not used.

    Raises:
        ConfigurationError: If a weight is negative or not finite, both weights are 0, `crossover` is not from 0 to 1,
            the seed is not an integer of at least 0, or another mutation is on.
    """

    no_mutation: float = 0.3
    rl_hp: float = 0.7
    _: KW_ONLY
    rand_seed: int = 42
    crossover: float = 0.0
    architecture: float = 0.0
    new_layer_prob: InitVar[float] = 0.0
    parameters: float = 0.0
    activation: float = 0.0
    mutation_sd: InitVar[float] = 0.1
    mutate_elite: bool = False
    device: InitVar[object] = None
    accelerator: InitVar[object] = None

    def __post_init__(self, new_layer_prob: float, mutation_sd: float, device: object, accelerator: object) -> None:
        """Check the weights and the seed; refuse mutations of other things than hyperparameters."""
        for field in ("architecture", "parameters", "activation"):
            weight = finite_number(field, getattr(self, field))
            if weight != 0:
                raise ConfigurationError(field, weight, "evollm mutates hyperparameters only; leave it at 0")
        if boolean("mutate_elite", self.mutate_elite):
            raise ConfigurationError("mutate_elite", self.mutate_elite, "the elite passes unmutated; leave it at False")
        for field in ("no_mutation", "rl_hp"):
            weight = finite_number(field, getattr(self, field))
            object.__setattr__(self, field, weight)
            if weight < 0:
                raise ConfigurationError(field, weight, "is a relative weight and must be at least 0")
        if self.no_mutation + self.rl_hp == 0:
            raise ConfigurationError("no_mutation", self.no_mutation, "and rl_hp are both 0; give one of them a weight")
        crossover = finite_number("crossover", self.crossover)
        object.__setattr__(self, "crossover", crossover)
        if not 0 <= crossover <= 1:
            raise ConfigurationError("crossover", crossover, "is a probability and must be from 0 to 1")
        object.__setattr__(self, "rand_seed", whole_number("rand_seed", self.rand_seed, minimum=0))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, without a crossover that is off."""
        return {name: value for name, value in asdict(self).items() if name != "crossover" or value}


@dataclass(frozen=True)
class Mutation:
    """One hyperparameter in which a child differs from its parent.

    Attributes:
        name: The hyperparameter.
        before: The parent's value.
        after: The child's value.
        factor: after / before (see `RLParameter.mutate`); None for a categorical hyperparameter.
    """

    name: str
    before: Value
    after: Value
    factor: float | None

    def __str__(self) -> str:
        """Return the mutation as text, such as `lr: 5.0e-6 -(x1.2)-> 6.0e-6` or `loss_type: sigmoid -> ipo`."""
        arrow = "->" if self.factor is None else f"-(x{self.factor:g})->"
        return f"{self.name}: {format_value(self.before)} {arrow} {format_value(self.after)}"


def format_value(value: Value | list[str]) -> str:
    """Return a hyperparameter as text: 5.0e-6 below 1e-3 and from 1e4 on, else up to 4 digits such as 0.12."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "+".join(value)
    if not math.isfinite(value):
        return str(value)
    plain = f"{value:.4g}"
    if value == 0 or 1e-3 <= abs(float(plain)) < 1e4:  # noqa: PLR2004
        return plain
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def mutate(
    values: Mapping[str, Value], config: HyperparameterConfig | None, settings: Mutations, rng: np.random.Generator
) -> tuple[Mutation, ...]:
    """Draw the mutations of one child.

    With probability no_mutation / (no_mutation + rl_hp) there is none; otherwise one hyperparameter of the config, all
    of them equally likely, is multiplied by its factor or takes another of its choices.

    Args:
        values: The parent's hyperparameters; those outside the config never change.
        config: The hyperparameters that may change; None if none may.
        settings: The weights.
        rng: Consumed by the same number of draws with and without a mutation, so that later children do not depend on
            earlier ones.

    Returns:
        At most one mutation.

    Raises:
        ConfigurationError: If `values` lacks the hyperparameter that was drawn.
    """
    if not config:
        return ()
    mutates = rng.random() * (settings.no_mutation + settings.rl_hp) >= settings.no_mutation
    # Sorted, so that the order of declaration does not change the draw.
    name = sorted(config)[int(rng.integers(len(config)))]
    if name not in values:
        raise ConfigurationError(name, None, "the agent has no value for it; give it one or drop it from the config")
    after, factor = config[name].mutate(values[name], rng)
    return (Mutation(name, values[name], after, factor),) if mutates else ()
