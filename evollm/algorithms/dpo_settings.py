"""The hyperparameters and settings of a DPO agent, and what its losses take of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from evollm.algorithms.losses import LOSSES, LossConstants, LossSettings
from evollm.algorithms.settings import AgentSettings, Hyperparameters
from evollm.checks import finite_number, nearest_name, positive_number
from evollm.errors import ConfigurationError

MOST_SMOOTHING = 0.5


@dataclass(frozen=True)
class DPOHyperparameters(Hyperparameters):
    """The values of a DPO agent that evolution may change.

    Attributes:
        beta: Strength of the pull towards the reference.
        nll_alpha: Weight of the negative log-likelihood of the chosen completions; 0 leaves it out.
        loss_type: Name of a loss, or a list of names.
        label_smoothing: Assumed probability that a label is wrong.
    """

    beta: float = 0.1
    nll_alpha: float = 1.0
    loss_type: str | Sequence[str] = "sigmoid"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "beta", float(positive_number("beta", self.beta)))
        for name in ("nll_alpha", "label_smoothing"):
            object.__setattr__(self, name, float(finite_number(name, getattr(self, name))))
        if self.nll_alpha < 0:
            raise ConfigurationError("nll_alpha", self.nll_alpha, "must not be negative; 0 leaves the term out")
        names = loss_names(self.loss_type)
        if not isinstance(self.loss_type, str):
            object.__setattr__(self, "loss_type", list(names))
        smallest = "above 0" if "exo_pair" in names else "at least 0"
        right = self.label_smoothing > 0 if "exo_pair" in names else self.label_smoothing >= 0
        if not (right and self.label_smoothing < MOST_SMOOTHING):
            fix = f"must be {smallest} and below {MOST_SMOOTHING} for loss_type={self.loss_type!r}"
            raise ConfigurationError("label_smoothing", self.label_smoothing, fix)


@dataclass(frozen=True)
class DPOSettings(LossConstants, AgentSettings):
    """Settings that no mutation changes, equal for all DPO agents of a population; `DPO` documents each field."""

    ld_alpha: float | None = None

    def __post_init__(self) -> None:
        AgentSettings.__post_init__(self)
        LossConstants.__post_init__(self)
        if self.ld_alpha is not None:
            object.__setattr__(self, "ld_alpha", float(finite_number("ld_alpha", self.ld_alpha)))
            if not 0 <= self.ld_alpha <= 1:
                raise ConfigurationError("ld_alpha", self.ld_alpha, "must be from 0 to 1, or None for plain sums")

    def check(self, hyperparameters: Hyperparameters) -> None:
        """Check also that there is a weight for each loss, and that not all weights are 0."""
        super().check(hyperparameters)
        assert isinstance(hyperparameters, DPOHyperparameters)
        weights = [weight for _, weight in loss_terms(hyperparameters, self)]
        if not any(weights) and hyperparameters.nll_alpha == 0:
            raise ConfigurationError("loss_weights", weights, "are all 0, and so is nll_alpha: nothing would be learnt")


def loss_names(loss_type: object) -> tuple[str, ...]:
    """The names in a `loss_type`.

    Raises:
        ConfigurationError: The value is no name or list of names, or a name is unknown.
    """
    names = (loss_type,) if isinstance(loss_type, str) else loss_type
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) for name in names):
        raise ConfigurationError("loss_type", loss_type, f"must be a name or a list of names: {', '.join(LOSSES)}")
    for name in names:
        if name not in LOSSES:
            nearest = nearest_name(name, LOSSES)
            fix = f"{name!r} is not a loss; the nearest is {nearest!r}, known are {', '.join(LOSSES)}"
            raise ConfigurationError("loss_type", loss_type, fix)
    return tuple(names)


def loss_terms(hyperparameters: DPOHyperparameters, settings: DPOSettings) -> tuple[tuple[str, float], ...]:
    """The losses and their weights; each weight is 1 if `loss_weights` is None.

    Raises:
        ConfigurationError: The number of weights is not that of losses.
    """
    names, weights = loss_names(hyperparameters.loss_type), settings.loss_weights
    if weights is None:
        return tuple((name, 1.0) for name in names)
    if len(weights) != len(names):
        fix = f"must hold a number for each of loss_type={hyperparameters.loss_type!r}"
        raise ConfigurationError("loss_weights", weights, fix)
    return tuple(zip(names, weights, strict=True))


def loss_settings(hyperparameters: DPOHyperparameters, settings: DPOSettings) -> LossSettings:
    """The numbers that the loss functions take."""
    constants = {field.name: getattr(settings, field.name) for field in fields(LossConstants)}
    return LossSettings(beta=hyperparameters.beta, label_smoothing=hyperparameters.label_smoothing, **constants)
