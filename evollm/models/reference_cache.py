"""Reference log-probabilities, computed once for each distinct reference and pair."""

from __future__ import annotations

from collections.abc import Callable

import torch

from evollm.data.batch import PreferenceBatch
from evollm.models.logprobs import PairLogprobs


class ReferenceCache:
    """Two log-probability sums for each (reference, pair), both identified by their content.

    Agents whose references hold the same weights share the entries, whoever asks first.
    """

    def __init__(self) -> None:
        self._entries: dict[str, dict[bytes, tuple[float, float]]] = {}

    def get(
        self, reference: str, batch: PreferenceBatch, compute: Callable[[PreferenceBatch], PairLogprobs]
    ) -> PairLogprobs:
        """Log-probs of every pair of the batch, computing those that are not known.

        Args:
            reference: Fingerprint of the reference's weights.
            batch: B pairs.
            compute: Gives the log-probs of the pairs that are missing; called at most once.

        Returns:
            (B,) float64 tensors on the CPU: float64 holds any sum exactly, whatever dtype it was computed in.
        """
        entries = self._entries.setdefault(reference, {})
        keys = batch.keys()
        missing = [row for row, key in enumerate(keys) if key not in entries]
        if missing:
            computed = compute(batch.select(missing))
            chosen, rejected = computed.chosen.tolist(), computed.rejected.tolist()
            for row, chosen_sum, rejected_sum in zip(missing, chosen, rejected, strict=True):
                entries[keys[row]] = (chosen_sum, rejected_sum)
        sums = torch.tensor([entries[key] for key in keys], dtype=torch.float64)
        return PairLogprobs(chosen=sums[:, 0], rejected=sums[:, 1])

    def forget(self, reference: str) -> None:
        """Drop the log-probs of a reference that is no more."""
        self._entries.pop(reference, None)

    def clear(self) -> None:
        """Drop everything."""
        self._entries.clear()

    def __len__(self) -> int:
        return sum(len(entries) for entries in self._entries.values())
