"""The sum of an objective's loss and the load-balancing loss of the base's routers."""

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
    """An objective plus the load-balancing loss that the base's configuration enables.

    Attributes:
        objective: The agent's objective without that loss.
        balancing: The load-balancing loss.
    """

    objective: Objective
    balancing: LoadBalancing
    # The gradient of a row depends on the experts to which the tokens of all rows are routed.
    whole_batch: ClassVar[bool] = True

    @property
    def weight(self) -> int:
        """Number of items, rows or tokens, over which the objective's loss is a mean."""
        return self.objective.weight

    def loss(self, rows: Sequence[int], policy: MemberLogprobs) -> Tensor:
        """The loss of the whole batch; `rows` must be all its rows."""
        loss = self.objective.loss(rows, policy)
        return loss + (self.balancing.coefficient * self._routers(policy)).to(loss)

    def metrics(self, policy: MemberLogprobs) -> dict[str, float]:
        """The objective's metrics, with `aux_loss`: the load-balancing loss before its coefficient."""
        metrics, routers = self.objective.metrics(policy), self._routers(policy).item()
        added = {name: metrics[name] + self.balancing.coefficient * routers for name in ("loss", "mean_loss")}
        return {**metrics, **added, "aux_loss": routers}

    def _routers(self, policy: MemberLogprobs) -> Tensor:
        assert policy.loads is not None
        return self.balancing.loss(policy.loads)
