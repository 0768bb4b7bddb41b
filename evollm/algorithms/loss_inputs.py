"""What the losses of pairs read beside the policy's log-probs, on the device of a pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from evollm.data.samples import Batch
from evollm.models.logprobs import CompletionSums
from evollm.models.upload import upload


class LossInputs(NamedTuple):
    """Of n pairs of a batch; see `evollm.algorithms.losses.PairScores`, of which these are fields."""

    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor


class LossTable:
    """The inputs of all members' losses on one batch, which go to the device of a pass in one copy.

    Args:
        batch: B pairs.
        references: For each member the (B,) sums of its reference on the CPU; members may share one.
    """

    def __init__(self, batch: Batch, references: Sequence[CompletionSums]) -> None:
        distinct = {id(reference): reference for reference in references}
        places = {one: 2 + 2 * number for number, one in enumerate(distinct)}
        self._places = [places[id(reference)] for reference in references]
        lengths = (torch.from_numpy(counts).double() for counts in (batch.chosen_scored, batch.rejected_scored))
        sums = (column for reference in distinct.values() for column in (reference.chosen, reference.rejected))
        self._table = torch.stack([*lengths, *sums])
        self._copies: dict[tuple[tuple[int, ...], torch.dtype, torch.device], Sequence[Tensor]] = {}

    def inputs(self, member: int, rows: Sequence[int], like: Tensor) -> LossInputs:
        """A member's inputs on these rows of the batch, with type and device of `like`."""
        kind = tuple(rows), like.dtype, like.device
        if kind not in self._copies:
            self._copies[kind] = upload(self._table[:, list(rows)].to(like.dtype), like.device).unbind()
        copy, place = self._copies[kind], self._places[member]
        return LossInputs(copy[place], copy[place + 1], copy[0], copy[1])
