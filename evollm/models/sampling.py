"""Sampled tokens that depend on the random numbers of their own answer alone, whatever else a call generates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessor


def uniform_numbers(key: Sequence[int], count: int) -> NDArray[np.float64]:
    """(count,) numbers in [0, 1) that are a function of the key; fewer numbers are the first ones of more.

    Args:
        key: Integers from 0 to 2^64 - 1. Keys of other lengths or with other integers give independent numbers.
        count: How many.
    """
    return np.random.Generator(np.random.Philox(_sequence(key))).random(count)


def seed_of(key: Sequence[int]) -> int:
    """A seed from 0 to 2^63 - 1 that is a function of the key, for samplers that have their own random numbers."""
    return int(_sequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _sequence(key: Sequence[int]) -> np.random.SeedSequence:
    # `SeedSequence` takes 32 bits at a time and takes zeros at the end for nothing.
    words = np.array(key, dtype=np.uint64).view(np.uint32)
    return np.random.SeedSequence([len(key), *words.tolist()])


def chosen_tokens(scores: Tensor, numbers: Tensor, temperatures: Tensor, top_p: float) -> Tensor:
    """The token of each row whose interval of the cumulative distribution, in the order of ids, holds its number.

    Args:
        scores: (n, V) logits.
        numbers: (n,) in [0, 1), float64.
        temperatures: (n,) above 0, float64.
        top_p: Only the fewest tokens with at least this probability together can be chosen (Holtzman et al. 2020, arXiv
            1904.09751), as with transformers: after the temperature.

    Returns:
        (n,) token ids. A row with a NaN gets some id.
    """
    probabilities = (scores.double() / temperatures[:, None]).softmax(dim=-1)
    if top_p < 1:
        ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered
        probabilities = probabilities.scatter(-1, ids, ordered.where(before < top_p, 0.0))
    cumulative = probabilities.cumsum(dim=-1)
    total = cumulative[:, -1]
    # Below the total also after rounding, so that no token of probability 0 is found after the last one.
    wanted = torch.minimum(numbers * total, torch.nextafter(total, torch.zeros_like(total)))
    found = torch.searchsorted(cumulative, wanted[:, None], right=True)[:, 0]
    return found.clamp(max=scores.shape[1] - 1)


def only_tokens(scores: Tensor, tokens: Tensor) -> Tensor:
    """Scores like those given, (n, V), that leave one token (n,) to each row: -inf for all others."""
    return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


class KeyedSampling(LogitsProcessor):
    """Leaves one token to each row of a greedy search, so that the search samples.

    Args:
        numbers: (n, T) one number in [0, 1) for each row and token to come.
        temperatures: (n,) the rows' temperatures, above 0.
        top_p: See `chosen_tokens`.
        start: Length of the sequences before the first token to come.
        device: Where the scores are.
    """

    def __init__(
        self,
        numbers: NDArray[np.float64],
        temperatures: Sequence[float],
        top_p: float,
        start: int,
        device: torch.device,
    ) -> None:
        # MPS has no float64.
        self._device = torch.device("cpu") if device.type == "mps" else device
        self._numbers = torch.from_numpy(numbers).to(self._device)
        self._temperatures = torch.tensor(temperatures, dtype=torch.float64, device=self._device)
        self._top_p = top_p
        self._start = start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (n, V), -inf for all tokens but the chosen one of each row."""
        numbers = self._numbers[:, input_ids.shape[1] - self._start]
        tokens = chosen_tokens(scores.to(self._device), numbers, self._temperatures, self._top_p).to(scores.device)
        return only_tokens(scores, tokens)
