"""Each sequence in a pass of its own, in which the network gets nothing but token ids.

It is what the network makes of a sequence when nobody tells it more: every other layout has to reproduce it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from evollm.data.samples import Batch, IntArray
from evollm.models.layouts.layout import Layout
from evollm.models.load_balancing import Span
from evollm.models.logprobs import Pieces, pieces_of


@dataclass(frozen=True)
class LoneLayout:
    """Sequences one by one.

    Attributes:
        device: Where the network is.
        logprobs: From a network, the ids of a prompt and of a completion, and a device to (C,) log-probs of the
            completion's tokens.
        padded: The layout in whose order samples are taken.
    """

    own_attention: ClassVar[bool] = True
    device: torch.device
    logprobs: Callable[[Any, IntArray, IntArray, torch.device], Tensor]
    padded: Layout

    def groups(self, batch: Batch, budget: int, most: int | None) -> list[list[int]]:
        """One sample each: processes that share the base's layers need passes of equally many sequences."""
        del most
        return self.padded.groups(batch, budget, 1)

    def lay_out(self, batch: Batch, members: Sequence[str | None]) -> LaidOutAlone:
        """Nothing is laid out beforehand."""
        del members
        return LaidOutAlone(self, batch)


class LaidOutAlone:
    """Samples whose sequences go one by one; see `evollm.models.layouts.layout.LaidOut`."""

    can_stack = False
    attention = ""

    def __init__(self, layout: LoneLayout, batch: Batch) -> None:
        self._layout = layout
        self._batch = batch
        self.num_tokens = batch.longest_sequence
        self.pieces: Pieces = pieces_of(batch, by_place=False)

    def passing(self, num_members: int, *, adapted: bool = True, whole: bool = False) -> AbstractContextManager[None]:
        """The network as it is."""
        del num_members, adapted, whole
        return nullcontext()

    def logprobs(self, network: Any, num_members: int) -> Tensor:
        """(1, C) log-probs."""
        assert num_members == 1
        found, device = [], self._layout.device
        for sample in self._batch:
            for completion in sample.completions:
                values = self._layout.logprobs(network, sample.prompt_ids, completion.ids, device)
                if completion.mask is not None:
                    values = values[torch.from_numpy(completion.mask).to(device)]
                found.append(values)
        return torch.cat(found).unsqueeze(0)

    def spans(self) -> list[Span]:
        """Sample by sample, without padding."""
        return [
            Span(row, 1, len(sample.prompt_ids) + len(completion))
            for row, sample in enumerate(self._batch)
            for completion in sample.completions
        ]
