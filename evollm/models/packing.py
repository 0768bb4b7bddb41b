"""Samples in one row without padding, the prompt once: the layout of the fast path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from evollm.data.samples import Batch, IntArray


class SampleLengths(NamedTuple):
    """Tokens of a sample's prompt and of each of its completions."""

    prompt: int
    completions: tuple[int, ...]


@dataclass(frozen=True)
class PackedSamples:
    """B samples, one after another in one row of N tokens: `prompt | completion | completion | prompt | ...`.

    The positions of each completion begin where the prompt ends, and the prompt's last token predicts the first token
    of each. Which tokens see which is up to the attention; see `evollm.models.attention`.

    Attributes:
        lengths: (B,) the lengths of each sample's parts.
        scored: Tokens of each completion that are scored, sample by sample.
        input_ids: (1, N) token ids.
        position_ids: (1, N) position of each token in its own sequence.
        predicting: (C,) columns whose logits predict a scored token, completion by completion.
        targets: (C,) the tokens that they predict.
    """

    lengths: tuple[SampleLengths, ...]
    scored: tuple[int, ...]
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
        lengths, scored = [], list[int]()
        start = 0
        for sample in batch:
            fork = len(sample.prompt_ids)
            ids.append(sample.prompt_ids)
            positions.append(np.arange(fork))
            last, start = start + fork - 1, start + fork
            for completion in sample.completions:
                columns = np.arange(start - 1, start - 1 + len(completion))
                columns[:1] = last
                ids.append(completion.ids)
                positions.append(np.arange(fork, fork + len(completion)))
                predicting.append(columns[completion.scored])
                targets.append(completion.ids[completion.scored])
                start += len(completion)
            scored += sample.num_scored
            lengths.append(SampleLengths(fork, tuple(map(len, sample.completions))))

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
