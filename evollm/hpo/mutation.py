"""What changes from parent to child: one hyperparameter, by one factor or to another choice, or nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, InitVar, dataclass

import numpy as np

from evollm.checks import boolean, finite_number, whole_number
from evollm.errors import ConfigurationError
from evollm.foreign import MUTATIONS, MUTATIONS_ORDER, explains_construction
from evollm.hpo.hyperparameters import HyperparameterConfig, Value

PLAIN_FROM, PLAIN_BELOW = 1e-3, 1e4


@explains_construction(MUTATIONS, MUTATIONS_ORDER)
@dataclass(frozen=True)
class Mutations:
    """Settings of the mutation of hyperparameters.

    Everything after `rand_seed` is accepted so that calls written for other libraries run. evollm mutates
    hyperparameters only, and an elite always passes unmutated, so the switches for other mutations have to stay off and
    what they would need is not looked at. All but the first two are given by their names.

    Args:
        no_mutation: Relative weight of a child that stays like its parent.
        rl_hp: Relative weight of a child with one hyperparameter changed.
        rand_seed: Seed of the draws.
        architecture: Has to be 0.
        new_layer_prob: Not used.
        parameters: Has to be 0.
        activation: Has to be 0.
        mutation_sd: Not used.
        mutate_elite: Has to be False.
        device: Not used.
        accelerator: Not used.

    Raises:
        ConfigurationError: If a weight is negative or not finite, both weights are 0, the seed is not an integer of at
            least 0, or one of the switches is on.
    """

    no_mutation: float = 0.3
    rl_hp: float = 0.7
    _: KW_ONLY
    rand_seed: int = 42
    architecture: float = 0.0
    new_layer_prob: InitVar[float] = 0.0
    parameters: float = 0.0
    activation: float = 0.0
    mutation_sd: InitVar[float] = 0.1
    mutate_elite: bool = False
    device: InitVar[object] = None
    accelerator: InitVar[object] = None

    def __post_init__(self, new_layer_prob: float, mutation_sd: float, device: object, accelerator: object) -> None:
        """Check the weights and refuse what evollm does not mutate."""
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
        object.__setattr__(self, "rand_seed", whole_number("rand_seed", self.rand_seed, minimum=0))


@dataclass(frozen=True)
class Mutation:
    """One hyperparameter that a child does not share with its parent.

    Attributes:
        name: The hyperparameter.
        before: The parent's value.
        after: The child's value.
        factor: What the value was multiplied by, after clipping; None for one of several choices.
    """

    name: str
    before: Value
    after: Value
    factor: float | None

    def __str__(self) -> str:
        """Return such as `lr: 5.0e-6 -(x1.2)-> 6.0e-6` or `loss_type: sigmoid -> ipo`."""
        arrow = "->" if self.factor is None else f"-(x{self.factor:g})->"
        return f"{self.name}: {format_value(self.before)} {arrow} {format_value(self.after)}"


def format_value(value: Value | list[str]) -> str:
    """Write a hyperparameter for a person: 5.0e-6 below 1e-3 and from 1e4 on, else plain with up to 4 digits (0.12)."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "+".join(value)
    if not math.isfinite(value):
        return str(value)
    plain = f"{value:.4g}"
    if value == 0 or PLAIN_FROM <= abs(float(plain)) < PLAIN_BELOW:
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
        rng: Consumed equally whether something mutates or not, so that one child's luck does not shift the next one's.

    Returns:
        No mutation or one.

    Raises:
        ConfigurationError: If `values` lacks the hyperparameter that was drawn.
    """
    if not config:
        return ()
    acts = rng.random() * (settings.no_mutation + settings.rl_hp) >= settings.no_mutation
    name = sorted(config)[int(rng.integers(len(config)))]  # equal configs draw equally, however written
    if name not in values:
        raise ConfigurationError(name, None, "the agent has no value for it; give it one or drop it from the config")
    after, factor = config[name].mutate(values[name], rng)
    return (Mutation(name, values[name], after, factor),) if acts else ()
