"""What the engine is asked for: items, each an adapter and a batch, and the options of their passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from evollm.data.samples import Batch
from evollm.models.load_balancing import LoadBalancing
from evollm.models.logprobs import TokenLogprobs

# (positions of items, rows of their batch, log-probs of these rows under the items' adapters) -> the sum of the
# items' losses on these rows.
ItemLoss = Callable[[Sequence[int], Sequence[int], TokenLogprobs], torch.Tensor]


class Item(NamedTuple):
    """A member's adapter, None for the base without adapter, and a batch of samples to compute log-probs of."""

    adapter: str | None
    batch: Batch

    @classmethod
    def on(cls, batch: Batch, adapters: Iterable[str | None]) -> list[Item]:
        """One item for each adapter, all with the same batch."""
        return [cls(adapter, batch) for adapter in adapters]


@dataclass(frozen=True)
class BatchSlot:
    """The position of a member among the members of a step, to replay the member alone in passes of the same shapes.

    The bits of a result depend on the shapes of the pass.

    Attributes:
        place: The member's position, from 0.
        of: Number of members in the step.
    """

    place: int
    of: int


@dataclass(frozen=True)
class PassOptions:
    """Options of the passes through the base, the same for all members of a call.

    Attributes:
        token_budget: Most tokens in a pass, over all its members; a longer sample has a pass of its own. None: chosen
            from the device and its free memory.
        max_pairs: Most samples of one member in a pass; None: no bound.
        explicit_positions: Whether position ids are passed; without them completions cannot share their prompt.
        gradient_checkpointing: Recompute activations in the backward pass. None: only if memory is too short for them.
        slot: For a single member: passes hold `slot.of` copies of the member, and the result is that of the copy at
            `slot.place`. None: each member once.
        balancing: The auxiliary loss of routers, for which each sample's expert loads are returned too; None: no loads.
        reference: Empty, or one adapter, None for the base without adapter: instead of log-probs the passes then give
            divergences from this reference.
        temperature: Divides the logits before their log-probs are taken, so that these are of the distribution that
            answers were sampled from.
    """

    token_budget: int | None = None
    max_pairs: int | None = None
    explicit_positions: bool = True
    gradient_checkpointing: bool | None = False
    slot: BatchSlot | None = None
    balancing: LoadBalancing | None = None
    reference: tuple[str | None, ...] = ()
    temperature: float = 1.0
