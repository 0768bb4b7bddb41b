"""One sequence in a pass, in which the network gets only token ids.

The probe takes the log-probs of this layout as the model's own, which every other layout has to reproduce.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from evollm.data.samples import Batch, IntArray
from evollm.models.layouts.layout import Layout
from evollm.models.load_balancing import Span
from evollm.models.logprobs import Pieces, pieces_of
from evollm.models.readings import LOGPROBS, Reading
from evollm.models.upload import upload


@dataclass(frozen=True)
class LoneLayout:
    """One sequence in a pass.

    Attributes:
        device: Where the network is.
        logprobs: (network, prompt ids, completion ids, device, reading) -> (C,) log-probs of the completion's tokens.
        padded: The padded layout whose order of samples is used.
    """

    own_attention: ClassVar[bool] = True
    device: torch.device
    logprobs: Callable[[Any, IntArray, IntArray, torch.device, Reading], Tensor]
    padded: Layout

    def groups(self, batch: Batch, budget: int, most: int | None) -> list[list[int]]:
        """One sample in a group: processes of a sharded base must run passes of equally many sequences."""
        del most
        return self.padded.groups(batch, budget, 1)

    def lay_out(self, batch: Batch, members: Sequence[str | None]) -> LaidOutAlone:
        """Keep the batch; sequences are built in `read`."""
        del members
        return LaidOutAlone(self, batch)


class LaidOutAlone:
    """Samples computed one sequence at a time; see `evollm.models.layouts.layout.LaidOut`."""

    can_stack = False
    attention = ""

    def __init__(self, layout: LoneLayout, batch: Batch) -> None:
        self._layout = layout
        self._batch = batch
        self.num_tokens = batch.longest_sequence
        self.pieces: Pieces = pieces_of(batch, by_place=False)

    def passing(self, num_members: int, *, adapted: bool = True, whole: bool = False) -> AbstractContextManager[None]:
        """An empty context: this layout does not change the network."""
        del num_members, adapted, whole
        return nullcontext()

    def read(self, network: Any, num_members: int, reading: Reading = LOGPROBS) -> Tensor:
        """(1, C) log-probs, or what else `reading` reads."""
        assert num_members == 1
        found, device = [], self._layout.device
        for sample in self._batch:
            for completion in sample.completions:
                values = self._layout.logprobs(network, sample.prompt_ids, completion.ids, device, reading)
                if completion.mask is not None:
                    values = values.index_select(0, upload(torch.from_numpy(np.flatnonzero(completion.mask)), device))
                found.append(values)
        return torch.cat(found).unsqueeze(0)

    def spans(self) -> list[Span]:
        """One span for each sequence, sample by sample, without padding."""
        return [
            Span(row, 1, len(sample.prompt_ids) + len(completion))
            for row, sample in enumerate(self._batch)
            for completion in sample.completions
        ]
