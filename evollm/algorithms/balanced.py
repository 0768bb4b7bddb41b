"""The loss of a batch and that of the base's routers, added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from evollm.models.load_balancing import LoadBalancing
from evollm.models.logprobs import MemberLogprobs

if TYPE_CHECKING:
    from evollm.algorithms.step import Objective


@dataclass(frozen=True)
class Balanced:
    """An objective with the loss of routers that the base's configuration asks for.

    Attributes:
        objective: What the agent minimises otherwise.
        balancing: The loss of routers.
    """

    objective: Objective
    balancing: LoadBalancing
    # How much a row counts depends on the experts that the tokens of all rows choose.
    whole_batch: ClassVar[bool] = True

    @property
    def weight(self) -> int:
        """Items of the batch that the loss is the mean over."""
        return self.objective.weight

    def loss(self, rows: Sequence[int], policy: MemberLogprobs) -> Tensor:
        """The loss of the batch, whose rows these are."""
        loss = self.objective.loss(rows, policy)
        return loss + (self.balancing.coefficient * self._routers(policy)).to(loss)

    def metrics(self, policy: MemberLogprobs) -> dict[str, float]:
        """Those of the objective, with `aux_loss`, that of the routers without its coefficient."""
        metrics, routers = self.objective.metrics(policy), self._routers(policy).item()
        added = {name: metrics[name] + self.balancing.coefficient * routers for name in ("loss", "mean_loss")}
        return {**metrics, **added, "aux_loss": routers}

    def _routers(self, policy: MemberLogprobs) -> Tensor:
        assert policy.loads is not None
        return self.balancing.loss(policy.loads)
