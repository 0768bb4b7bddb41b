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

    Samples of members that have their own lie in blocks of equally many tokens, one after another. What fills a block
    up is a sequence without a prompt: copies of the block's first token at position 0, whose states are that token's
    own, so that nothing in a block comes from another member.

    Attributes:
        lengths: The lengths of the parts of each sample, and of each sequence that fills a block up.
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
    def of(cls, batch: Batch, device: torch.device, counts: Sequence[int] = ()) -> PackedSamples:
        """Lay out a batch on a device.

        Args:
            batch: B samples.
            device: The device.
            counts: Consecutive samples of each block; empty: one block.
        """
        ids: list[IntArray] = []
        positions: list[IntArray] = []
        predicting: list[IntArray] = []
        targets: list[IntArray] = []
        lengths: list[SampleLengths] = []
        missing = _missing_tokens(batch, counts)
        start = 0
        for row, sample in enumerate(batch):
            lengths.append(SampleLengths.of(sample))
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
            if row in missing:
                first, count = missing[row]
                lengths.append(SampleLengths(0, (count,)))
                ids.append(np.full(count, batch[first].prompt_ids[0]))
                positions.append(np.zeros(count, np.int64))
                start += count

        tables = upload_arrays([np.concatenate(parts) for parts in (ids, positions, predicting, targets)], device)
        input_ids, position_ids, predicted, scored = tables
        return cls(
            lengths=tuple(lengths),
            input_ids=input_ids.unsqueeze(0),
            position_ids=position_ids.unsqueeze(0),
            predicting=predicted,
            targets=scored,
        )


def _missing_tokens(batch: Batch, counts: Sequence[int]) -> dict[int, tuple[int, int]]:
    """For the last row of each block that is not the longest one: the block's first row, and the tokens it lacks."""
    ends = np.cumsum(counts, dtype=np.int64).tolist()
    starts = [0, *ends[:-1]] if ends else []
    sizes = [int(batch.num_tokens[start:end].sum()) for start, end in zip(starts, ends, strict=True)]
    found = zip(starts, ends, sizes, strict=True)
    return {end - 1: (start, max(sizes) - size) for start, end, size in found if size < max(sizes)}


@dataclass(frozen=True)
class PackedLayout:
    """Samples in one row, with each prompt once for all completions of its sample.

    Attributes:
        base: The base.
        tiled_head: Apply the head to tiles of the hidden states; see `evollm.models.head`.
        counts: Where each member has samples of its own: the number of consecutive samples of each member of the pass.
            Empty: all members have all samples.
    """

    own_attention: ClassVar[bool] = False
    base: SharedBase
    tiled_head: bool
    counts: tuple[int, ...] = ()

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
        # Without counts as for any layout, one row for each member.
        self._packed = PackedSamples.of(batch, base.device, *([layout.counts] if layout.counts else []))
        self._even = _even_index(batch, layout.counts, base.device) if layout.counts else None
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
            fan_out.members = 1 if self._layout.counts else num_members
            if whole:
                fan_out.first = 0
        with self._layout.base.packed(self._sequences, fan_out):
            yield

    def read(self, network: Any, num_members: int, reading: Reading = LOGPROBS) -> Tensor:
        """(M, C) log-probs, or what else `reading` reads.

        Where members have samples of their own, C is the largest number of a member's scored tokens, and what follows
        the tokens of another member in its row is without meaning.
        """
        packed, even = self._packed, self._even
        inputs = {"input_ids": packed.input_ids, "position_ids": packed.position_ids, "use_cache": False}
        rows = num_members if even is None else 1
        if not self._layout.tiled_head:
            columns, targets = packed.predicting, packed.targets
            if even is not None:
                # In front of the head, since an adapter on it needs equal blocks.
                columns, targets = columns.index_select(0, even), targets.index_select(0, even)
            logits = logits_at(network, inputs, columns)  # (M, C, V)
            return reading.of_logits(logits, targets.expand(rows, -1)).view(num_members, -1)
        hidden = hidden_states(network, inputs).index_select(1, packed.predicting)  # (M, C, D)
        found = reading.of_hidden(hidden.flatten(0, 1), linear_head(network), packed.targets.repeat(rows))
        return (found if even is None else found.index_select(0, even)).view(num_members, -1)

    def spans(self) -> list[Span]:
        """A prompt has its number of completions as weight, as if the prompt were repeated for each."""
        spans, row = [], 0
        for prompt, completions in self._packed.lengths:
            if not prompt:
                # It fills up the block of the sample before it.
                spans.append(Span(row - 1, 0, completions[0]))
                continue
            spans.append(Span(row, len(completions), prompt))
            spans += [Span(row, 1, length) for length in completions]
            row += 1
        return spans


def _even_index(batch: Batch, counts: Sequence[int], device: torch.device) -> Tensor:
    """(M C,) which scored tokens stand in the rows of M members with C tokens; a shorter row repeats its first one."""
    scored = np.array([sum(sample.num_scored) for sample in batch])
    sizes = [int(part.sum()) for part in np.split(scored, np.cumsum(counts)[:-1])]
    starts = np.cumsum([0, *sizes[:-1]])
    steps = np.arange(max(sizes))
    (index,) = upload_arrays(
        [np.concatenate([start + np.where(steps < size, steps, 0) for start, size in zip(starts, sizes, strict=True)])],
        device,
    )
    return index
