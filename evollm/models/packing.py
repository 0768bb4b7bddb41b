"""Pairs in one row without padding, the prompt once: the layout of the fast path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from evollm.data.batch import IntArray, PreferenceBatch


class PairLengths(NamedTuple):
    """Tokens of a pair's three parts."""

    prompt: int
    chosen: int
    rejected: int


@dataclass(frozen=True)
class PackedPairs:
    """B pairs, one after another in one row of N tokens: `prompt | chosen | rejected | prompt | chosen | ...`.

    A rejected side may be empty: an SFT example has none. Its positions begin again where the prompt ends, and the
    prompt's last token predicts the first token of both sides. Which tokens see which is up to the attention; see
    `evollm.models.attention`.

    Attributes:
        lengths: (B,) the lengths of each pair's parts.
        scored: (2B,) tokens of each side that are scored; of each pair first the chosen side's.
        input_ids: (1, N) token ids.
        position_ids: (1, N) position of each token in its own sequence.
        predicting: (C,) columns whose logits predict a scored token; of each pair first the chosen side's.
        targets: (C,) the tokens that they predict.
    """

    lengths: tuple[PairLengths, ...]
    scored: tuple[int, ...]
    input_ids: Tensor
    position_ids: Tensor
    predicting: Tensor
    targets: Tensor

    @classmethod
    def of(cls, batch: PreferenceBatch, device: torch.device) -> PackedPairs:
        """Lay out a batch on a device."""
        ids: list[IntArray] = []
        positions: list[IntArray] = []
        predicting: list[IntArray] = []
        targets: list[IntArray] = []
        lengths, scored = [], list[int]()
        start = 0
        for row in range(len(batch)):
            pair = batch.pair(row)
            size = PairLengths(len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids))
            fork, middle = start + size.prompt, start + size.prompt + size.chosen
            end = middle + size.rejected
            ids += [pair.prompt_ids, pair.chosen_ids, pair.rejected_ids]
            positions += [_range(0, size.prompt + size.chosen), _range(size.prompt, size.prompt + size.rejected)]
            first = _range(fork - 1, fork)
            columns = (
                _range(fork - 1, middle - 1),
                np.concatenate([first[: size.rejected], _range(middle, end - 1)]),
            )
            for column, side, mask in zip(columns, (pair.chosen_ids, pair.rejected_ids), pair.masks, strict=True):
                predicting.append(column[mask])
                targets.append(side[mask])
            scored += pair.num_scored
            lengths.append(size)
            start = end

        def tensor(parts: Sequence[IntArray]) -> Tensor:
            return torch.from_numpy(np.concatenate(parts)).to(device)

        return cls(
            lengths=tuple(lengths),
            scored=tuple(scored),
            input_ids=tensor(ids).unsqueeze(0),
            position_ids=tensor(positions).unsqueeze(0),
            predicting=tensor(predicting),
            targets=tensor(targets),
        )


def _range(start: int, end: int) -> IntArray:
    return np.arange(start, end, dtype=np.int64)
