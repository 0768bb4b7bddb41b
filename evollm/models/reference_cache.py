"""Reference log-probabilities, computed once for each distinct reference and pair."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from evollm.data.samples import Batch
from evollm.errors import CheckpointError
from evollm.models.logprobs import PairLogprobs

# From pairs and positions of references to each one's log-probs of these pairs.
Compute = Callable[[Batch, Sequence[int]], list[PairLogprobs]]

_KEY_BYTES = 16


# Entries that hold the sums up to the shorter side too are apart from those that do not.
_WITH_SHORTER = " up to the shorter side"


class ReferenceCache:
    """Two log-probability sums for each (reference, pair), or four; both are identified by their content.

    Agents whose references hold the same weights share the entries, whoever asks first.

    Attributes:
        told_of: Split and digest of the pairs with sums that are not finite, which the user has been told of.
    """

    def __init__(self) -> None:
        self._entries: dict[str, dict[bytes, tuple[float, ...]]] = {}
        self.told_of: set[tuple[str, bytes]] = set()

    def get(
        self, references: Sequence[str], batch: Batch, compute: Compute, *, up_to_shorter: bool = False
    ) -> list[PairLogprobs]:
        """Log-probs of every pair of the batch under each reference, computing those that are not known.

        Args:
            references: Fingerprints of the references' weights, all different.
            batch: B pairs.
            compute: Gives the log-probs of the pairs that are missing; called once for references that miss the same.
            up_to_shorter: Whether these have the sums up to the shorter side's length too.

        Returns:
            (B,) float64 tensors on the CPU for each: float64 holds any sum exactly, whatever it was computed in.
        """
        keys = batch.keys()
        if up_to_shorter:
            references = [reference + _WITH_SHORTER for reference in references]
        lacking: dict[tuple[int, ...], list[int]] = {}
        for number, reference in enumerate(references):
            entries = self._entries.setdefault(reference, {})
            missing = tuple(row for row, key in enumerate(keys) if key not in entries)
            if missing:
                lacking.setdefault(missing, []).append(number)
        for rows, numbers in lacking.items():
            for number, computed in zip(numbers, compute(batch.select(list(rows)), numbers), strict=True):
                sums = zip(*(column.tolist() for column in computed.columns), strict=True)
                self._entries[references[number]].update(zip((keys[row] for row in rows), sums, strict=True))
        return [self._lookup(reference, keys) for reference in references]

    def known_as_not_finite(self, reference: str, batch: Batch) -> list[int]:
        """The rows of a batch whose sums are known, and are not all finite."""
        entries = self._entries.get(reference)
        if not entries:
            return []
        found = (entries.get(key, ()) for key in batch.keys())  # noqa: SIM118 - not a mapping
        return [row for row, sums in enumerate(found) if not all(map(math.isfinite, sums))]

    def _lookup(self, reference: str, keys: Sequence[bytes]) -> PairLogprobs:
        sums = torch.tensor([self._entries[reference][key] for key in keys], dtype=torch.float64)
        return PairLogprobs.of(sums.unbind(dim=1))

    def forget(self, reference: str) -> None:
        """Drop the log-probs of a reference that is no more."""
        self._entries.pop(reference, None)
        self._entries.pop(reference + _WITH_SHORTER, None)

    def clear(self) -> None:
        """Drop everything."""
        self._entries.clear()
        self.told_of.clear()

    def save(self, path: Path) -> None:
        """Write all entries into one safetensors file: for each reference the pairs' digests and sums."""
        tensors = {}
        for number, entries in enumerate(self._entries.values()):
            digests = np.frombuffer(b"".join(entries), dtype=np.uint8).reshape(-1, _KEY_BYTES)
            tensors[f"pairs-{number}"] = torch.from_numpy(digests.copy())  # (n, 16)
            tensors[f"sums-{number}"] = torch.tensor(list(entries.values()), dtype=torch.float64)  # (n, 2 or 4)
        path.write_bytes(save(tensors, metadata={"references": json.dumps(list(self._entries))}))

    def update(self, other: ReferenceCache) -> None:
        """Add another cache's entries."""
        for reference, entries in other._entries.items():
            self._entries.setdefault(reference, {}).update(entries)

    def load(self, path: Path) -> None:
        """Add the entries that `save` wrote.

        Raises:
            CheckpointError: The file is missing or damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                for number, reference in enumerate(json.loads(file.metadata()["references"])):
                    digests = file.get_tensor(f"pairs-{number}").numpy()
                    sums = file.get_tensor(f"sums-{number}").tolist()
                    entries = self._entries.setdefault(reference, {})
                    entries.update(
                        (digest.tobytes(), tuple(columns)) for digest, columns in zip(digests, sums, strict=True)
                    )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be read as reference log-probs: {error}") from error

    def __len__(self) -> int:
        return sum(len(entries) for entries in self._entries.values())
