"""Reference log-probabilities, computed once for each distinct reference and sample."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from evollm.data.samples import Batch, Sample
from evollm.errors import CheckpointError
from evollm.models.logprobs import CompletionSums

# (samples, positions of references) -> each reference's log-probs of these samples.
Compute = Callable[[Batch, Sequence[int]], list[CompletionSums]]

_KEY_BYTES = 16
# Sums of a sample with fewer completions are padded with zeros, so that an SFT example has as many as a pair.
_FEWEST_SUMS = 2

# Suffix of the keys under which entries that also hold the sums up to the shortest completion are kept.
_WITH_SHORTER = " up to the shorter side"


class ReferenceCache:
    """One or two sums of log-probs for each completion of each (reference, sample), keyed by digests of both contents.

    Agents whose references hold the same weights share entries.

    Attributes:
        told_of: Split and digest of samples with non-finite sums of which the user has been warned.
        left_out: Split and digest of samples that the last evaluation left out.
    """

    def __init__(self) -> None:
        self._entries: dict[str, dict[bytes, tuple[float, ...]]] = {}
        self._expected: Sequence[Sample] = ()
        self.told_of: set[tuple[str, bytes]] = set()
        self.left_out: set[tuple[str, bytes]] = set()

    @contextmanager
    def expecting(self, samples: Sequence[Sample]) -> Iterator[None]:
        """Inside the block what computes a batch's missing log-probs computes those of these samples, too.

        Args:
            samples: Samples of later batches; none: a batch is computed by itself.
        """
        self._expected = samples
        try:
            yield
        finally:
            self._expected = ()

    def get(
        self, references: Sequence[str], batch: Batch, compute: Compute, *, up_to_shorter: bool = False
    ) -> list[CompletionSums]:
        """Log-probs of every sample of the batch under each reference; only those not in the cache are computed.

        If any is missing, those of the samples that `expecting` was given are computed with it.

        Args:
            references: Fingerprints of the references' weights, all different.
            batch: B samples.
            compute: Gives the log-probs of missing samples; called once for all references that lack the same samples.
            up_to_shorter: Whether to include the sums up to the shortest completion's length.

        Returns:
            For each reference (B,) float64 tensors on the CPU; float64 represents float32 and float64 sums exactly.
        """
        if up_to_shorter:
            references = [reference + _WITH_SHORTER for reference in references]
        wanted = replace(batch, samples=[*batch, *self._expected]) if self._expected else batch
        keys = wanted.keys()
        lacking: dict[tuple[int, ...], list[int]] = {}
        for number, reference in enumerate(references):
            entries = self._entries.setdefault(reference, {})
            missing = tuple(row for row, key in enumerate(keys) if key not in entries)
            if any(row < len(batch) for row in missing):
                lacking.setdefault(missing, []).append(number)
        for rows, numbers in lacking.items():
            for number, computed in zip(numbers, compute(wanted.select(list(rows)), numbers), strict=True):
                sums = _sums_of(computed, [wanted[row] for row in rows])
                self._entries[references[number]].update(zip((keys[row] for row in rows), sums, strict=True))
        return [self._lookup(reference, batch, up_to_shorter) for reference in references]

    def known_as_not_finite(self, reference: str, batch: Batch) -> list[int]:
        """The rows of a batch with cached sums that are not all finite."""
        entries = self._entries.get(reference)
        if not entries:
            return []
        found = (entries.get(key, ()) for key in batch.keys())  # noqa: SIM118 - not a mapping
        return [row for row, sums in enumerate(found) if not all(map(math.isfinite, sums))]

    def _lookup(self, reference: str, batch: Batch, up_to_shorter: bool) -> CompletionSums:
        width = max(len(sample.completions) for sample in batch)
        whole, shorter = [], []
        for sample in batch:
            entry, count = self._entries[reference][sample.key], max(len(sample.completions), _FEWEST_SUMS)
            whole.append(_filled(entry[:count], width)[:width])
            shorter.append(_filled(entry[count:], width)[:width])
        sums = [torch.tensor(part, dtype=torch.float64).unbind(dim=1) for part in (whole, shorter)]
        return CompletionSums(sums[0], sums[1] if up_to_shorter else None)

    def forget(self, reference: str) -> None:
        """Drop the log-probs of a reference whose adapter is gone."""
        self._entries.pop(reference, None)
        self._entries.pop(reference + _WITH_SHORTER, None)

    def clear(self) -> None:
        """Drop all entries, and `told_of`."""
        self._entries.clear()
        self.told_of.clear()

    def save(self, path: Path) -> None:
        """Write all entries into one safetensors file; see `tensors`."""
        tensors, references = self.tensors()
        path.write_bytes(save(tensors, metadata={"references": json.dumps(references)}))

    def tensors(self) -> tuple[dict[str, torch.Tensor], list[str]]:
        """All entries: the samples' digests and sums of each reference, by its number, and the references.

        A reference whose samples have different numbers of sums is there once for each number.
        """
        tensors: dict[str, torch.Tensor] = {}
        references: list[str] = []
        for reference, entries in self._entries.items():
            for width in dict.fromkeys(map(len, entries.values())) or [0]:
                number, part = len(references), {key: sums for key, sums in entries.items() if len(sums) == width}
                digests = np.frombuffer(b"".join(part), dtype=np.uint8).reshape(-1, _KEY_BYTES)
                tensors[f"pairs-{number}"] = torch.from_numpy(digests.copy())  # (n, 16)
                tensors[f"sums-{number}"] = torch.tensor(list(part.values()), dtype=torch.float64)  # (n, width)
                references.append(reference)
        return tensors, references

    def add(self, tensor: Callable[[str], torch.Tensor], references: Sequence[str]) -> None:
        """Add the entries that `tensors` gave; `tensor` gives its tensors by name."""
        for number, reference in enumerate(references):
            digests, sums = tensor(f"pairs-{number}").numpy(), tensor(f"sums-{number}").tolist()
            entries = self._entries.setdefault(reference, {})
            entries.update((digest.tobytes(), tuple(columns)) for digest, columns in zip(digests, sums, strict=True))

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
                self.add(file.get_tensor, json.loads(file.metadata()["references"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be read as reference log-probs: {error}") from error

    def __len__(self) -> int:
        return sum(len(entries) for entries in self._entries.values())


def _sums_of(computed: CompletionSums, samples: Sequence[Sample]) -> list[tuple[float, ...]]:
    """For each sample the sums of its completions, then the sums up to the shortest completion's length, if any."""
    parts = [computed.columns, *([computed.up_to_shorter] if computed.up_to_shorter else [])]
    rows = [list(zip(*(column.tolist() for column in part), strict=True)) for part in parts]
    counts = [len(sample.completions) for sample in samples]
    return [
        tuple(value for part in own for value in _filled(part[:count], _FEWEST_SUMS))
        for count, *own in zip(counts, *rows, strict=True)
    ]


def _filled(sums: tuple[float, ...], count: int) -> tuple[float, ...]:
    """The sums, padded with zeros to `count`."""
    return sums + (0.0,) * (count - len(sums))
