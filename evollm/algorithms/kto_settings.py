"""The hyperparameters of a KTO agent."""

from __future__ import annotations

from dataclasses import dataclass

from evollm.algorithms.settings import Hyperparameters
from evollm.algorithms.unpaired_losses import UNPAIRED_LOSSES, WITH_KL
from evollm.checks import nearest_name, positive_number
from evollm.errors import ConfigurationError

# Fewest answers of a batch from which a divergence can be estimated.
FEWEST_ANSWERS = 2


@dataclass(frozen=True)
class KTOHyperparameters(Hyperparameters):
    """The values of a KTO agent that evolution may change.

    Attributes:
        beta: Strength of the pull towards the reference.
        desirable_weight: Weight of the losses of desirable answers.
        undesirable_weight: Weight of the losses of undesirable answers.
        loss_type: Name of the loss.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    loss_type: str = "kto"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            object.__setattr__(self, name, float(positive_number(name, getattr(self, name))))
        if not isinstance(self.loss_type, str) or self.loss_type not in UNPAIRED_LOSSES:
            nearest = nearest_name(self.loss_type, UNPAIRED_LOSSES) if isinstance(self.loss_type, str) else None
            hint = f"; the nearest is {nearest!r}" if nearest else ""
            fix = f"must be one of {', '.join(UNPAIRED_LOSSES)}{hint}; losses of pairs are for DPO"
            raise ConfigurationError("loss_type", self.loss_type, fix)
        if self.loss_type in WITH_KL and self.batch_size < FEWEST_ANSWERS:
            raise ConfigurationError("batch_size", self.batch_size, needs_two(self.loss_type))


def needs_two(loss_type: str) -> str:
    """What to do about batches of one answer."""
    return (
        f"loss_type={loss_type!r} estimates a divergence from the answers of other prompts in the batch: give at least "
        f"{FEWEST_ANSWERS}, or take apo_zero_unpaired"
    )
