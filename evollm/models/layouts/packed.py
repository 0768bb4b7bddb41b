"""Samples in one row without padding, each prompt once: the layout of the fast path."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from evollm.data.samples import Batch, IntArray
from evollm.models.attention import PackedSequences, SampleLengths
from evollm.models.grouping import balanced_groups
from evollm.models.layers import FanOut
from evollm.models.load_balancing import Span
from evollm.models.logprobs import (
    Pieces,
    hidden_states,
    linear_head,
    logits_at,
    pieces_of,
)
from evollm.models.readings import LOGPROBS, Reading
from evollm.models.shared_base import SharedBase
from evollm.models.upload import upload_arrays


@dataclass(frozen=True)
class PackedSamples:
    """B samples, one after another in one row of N tokens: `prompt | completion | completion | prompt | ...`.

    The position ids of each completion continue the prompt's, and the prompt's last token predicts the first token of
    each completion. `evollm.models.attention` restricts each completion to its prompt and itself.

    Attributes:
        lengths: (B,) the lengths of each sample's parts.
        input_ids: (1, N) token ids.
        position_ids: (1, N) position of each token in its sequence prompt + completion.
        predicting: (C,) columns whose logits predict a scored token, completion by completion.
        targets: (C,) the scored tokens, which these columns predict.
    """

    lengths: tuple[SampleLengths, ...]
    input_ids: Tensor
    position_ids: Tensor
    predicting: Tensor
    targets: Tensor

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> PackedSamples:
        """Lay out a batch on a device."""
        ids: list[IntArray] = []
        positions: list[IntArray] = []
        predicting: list[IntArray] = []
        targets: list[IntArray] = []
        start = 0
        for sample in batch:
            fork = len(sample.prompt_ids)
            ids.append(sample.prompt_ids)
            positions.append(np.arange(fork))
            last, start = start + fork - 1, start + fork
            for completion in sample.completions:
                columns = np.arange(start - 1, start - 1 + len(completion))
                columns[0] = last
                ids.append(completion.ids)
                positions.append(np.arange(fork, fork + len(completion)))
                predicting.append(columns[completion.scored])
                targets.append(completion.ids[completion.scored])
                start += len(completion)

        tables = upload_arrays([np.concatenate(parts) for parts in (ids, positions, predicting, targets)], device)
        input_ids, position_ids, predicted, scored = tables
        return cls(
            lengths=tuple(SampleLengths.of(sample) for sample in batch),
            input_ids=input_ids.unsqueeze(0),
            position_ids=position_ids.unsqueeze(0),
            predicting=predicted,
            targets=scored,
        )


@dataclass(frozen=True)
class PackedLayout:
    """Samples in one row, with each prompt once for all completions of its sample.

    Attributes:
        base: The base.
        tiled_head: Apply the head to tiles of the hidden states; see `evollm.models.head`.
    """

    own_attention: ClassVar[bool] = False
    base: SharedBase
    tiled_head: bool

    def groups(self, batch: Batch, budget: int, most: int | None) -> list[list[int]]:
        """Passes of about equally many tokens."""
        return balanced_groups(batch.num_tokens.tolist(), budget, most)

    def lay_out(self, batch: Batch, members: Sequence[str | None]) -> LaidOutPacked:
        """Lay out a batch for passes of these members."""
        return LaidOutPacked(self, batch, members)


class LaidOutPacked:
    """Samples laid out in one row; see `evollm.models.layouts.layout.LaidOut`."""

    def __init__(self, layout: PackedLayout, batch: Batch, members: Sequence[str | None]) -> None:
        base = layout.base
        self._layout = layout
        self.pieces: Pieces = pieces_of(batch, by_place=False)
        self._packed = PackedSamples.of(batch, base.device)
        self._sequences = PackedSequences(self._packed.lengths, base.device, base.network.dtype)
        first = base.adapters.first_layer([name for name in members if name is not None])
        self._fan_out = None if first is None else FanOut(first, 1)

    @property
    def num_tokens(self) -> int:
        """N."""
        return self._packed.input_ids.numel()

    @property
    def can_stack(self) -> bool:
        """Whether members may share a pass, in which the layers below the first adapter run once."""
        return self._fan_out is not None

    @property
    def attention(self) -> str:
        """The attention implementations used so far, in words."""
        return " and ".join(sorted(self._sequences.kinds))

    @contextmanager
    def passing(self, num_members: int, *, adapted: bool = True, whole: bool = False) -> Iterator[None]:
        """Make attention follow the packed sequences, and members fan out at the first adapter, inside the block."""
        # Without an adapter all layers are shared.
        fan_out = self._fan_out if adapted else None
        if fan_out is not None:
            fan_out.members = num_members
            if whole:
                fan_out.first = 0
        with self._layout.base.packed(self._sequences, fan_out):
            yield

    def read(self, network: Any, num_members: int, reading: Reading = LOGPROBS) -> Tensor:
        """(M, C) log-probs, or what else `reading` reads."""
        packed = self._packed
        inputs = {"input_ids": packed.input_ids, "position_ids": packed.position_ids, "use_cache": False}
        if not self._layout.tiled_head:
            logits = logits_at(network, inputs, packed.predicting)  # (M, C, V)
            return reading.of_logits(logits, packed.targets.expand(num_members, -1))
        hidden = hidden_states(network, inputs).index_select(1, packed.predicting)  # (M, C, D)
        targets = packed.targets.repeat(num_members)
        return reading.of_hidden(hidden.flatten(0, 1), linear_head(network), targets).view(num_members, -1)

    def spans(self) -> list[Span]:
        """A prompt has its number of completions as weight, as if the prompt were repeated for each."""
        spans = []
        for row, (prompt, completions) in enumerate(self._packed.lengths):
            spans.append(Span(row, len(completions), prompt))
            spans += [Span(row, 1, length) for length in completions]
        return spans
