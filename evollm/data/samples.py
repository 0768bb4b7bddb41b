"""Samples as token ids: a prompt and the completions that continue it; and batches, which are lists of samples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evollm.errors import DataError

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

LABEL = "label"


@dataclass(frozen=True, eq=False)
class Completion:
    """Token ids that continue a prompt.

    Attributes:
        ids: (C,) token ids with what ends them: one EOS after a string, and after messages whatever the chat template
            writes.
        mask: (C,) True where a token is scored: what the assistant says, of a completion in which others speak too.
            None: all of them.
    """

    ids: IntArray
    mask: BoolArray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def scored(self) -> BoolArray:
        """(C,) True where a token is scored."""
        return np.ones(len(self.ids), np.bool_) if self.mask is None else self.mask

    @cached_property
    def num_scored(self) -> int:
        """Tokens that are scored."""
        return len(self.ids) if self.mask is None else int(self.mask.sum())


@dataclass(frozen=True, eq=False)
class Sample:
    """A prompt and k completions of it: one in an example for SFT, in a preference pair the chosen one and the other.

    Attributes:
        prompt_ids: (P,) token ids, at least one.
        completions: The k completions, at least one.
        row: Position of its row in the user's dataset, where there is one.
        extras: What else an objective needs, by name, such as a `label` of the one completion.

    Raises:
        DataError: The prompt or a completion has no token, or there is no completion.
    """

    prompt_ids: IntArray
    completions: tuple[Completion, ...]
    row: int | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not len(self.prompt_ids) or not self.completions or not all(map(len, self.completions)):
            sizes = len(self.prompt_ids), *map(len, self.completions)
            raise DataError("sample", sizes, "must have a prompt and completions of at least one token each")

    @classmethod
    def of(cls, prompt_ids: IntArray, *completion_ids: IntArray, row: int | None = None) -> Sample:
        """A sample all of whose completions' tokens are scored."""
        return cls(prompt_ids, tuple(Completion(ids) for ids in completion_ids), row)

    @property
    def chosen_ids(self) -> IntArray:
        """(C,) ids of the first completion, a pair's chosen one."""
        return self.completions[0].ids

    @property
    def rejected_ids(self) -> IntArray:
        """(R,) ids of a pair's other completion; `IndexError` without one."""
        return self.completions[1].ids

    @property
    def label(self) -> float | None:
        """What the row says of its one completion; None: nothing."""
        return self.extras.get(LABEL)

    @property
    def token_ids(self) -> IntArray:
        """(P + C + ...,) all ids: the prompt's, then each completion's."""
        return np.concatenate([self.prompt_ids, *(completion.ids for completion in self.completions)])

    @cached_property
    def id_range(self) -> tuple[int, int]:
        """The smallest and the largest token id."""
        ids = self.token_ids
        return int(ids.min()), int(ids.max())

    @property
    def num_tokens(self) -> int:
        """Tokens of the sample with the prompt counted once."""
        return len(self.prompt_ids) + sum(map(len, self.completions))

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest sequence prompt + completion."""
        return len(self.prompt_ids) + max(map(len, self.completions))

    @property
    def num_scored(self) -> tuple[int, ...]:
        """Tokens of each completion that are scored."""
        return tuple(completion.num_scored for completion in self.completions)

    @property
    def masks(self) -> tuple[BoolArray, ...]:
        """For each completion (C,) True where a token is scored."""
        return tuple(completion.scored for completion in self.completions)

    @property
    def has_mask(self) -> bool:
        """Whether a token of a completion is not scored."""
        return any(completion.mask is not None for completion in self.completions)

    def with_mask(self, mask: BoolArray) -> Sample:
        """The sample with what is scored of its completions, which follow each other in the mask."""
        ends = np.cumsum([len(completion) for completion in self.completions])[:-1]
        parts = zip(self.completions, np.split(mask, ends), strict=True)
        masked = (Completion(completion.ids, None if part.all() else part) for completion, part in parts)
        return replace(self, completions=tuple(masked))

    @cached_property
    def key(self) -> bytes:
        """Digest of the token ids, the lengths, what is not scored and the extras: equal samples have equal keys."""
        digest = hashlib.blake2b(digest_size=16)
        parts = [self.prompt_ids, *(completion.ids for completion in self.completions)]
        if len(parts) == 2:  # noqa: PLR2004 - as ever: an example has the key of a pair whose rejected side is empty
            parts.append(self.prompt_ids[:0])
        for ids in parts:
            digest.update(len(ids).to_bytes(8, "little") + np.ascontiguousarray(ids).tobytes())
        if self.has_mask:
            digest.update(np.concatenate(self.masks).tobytes())
        for name, value in sorted(self.extras.items()):
            digest.update(f"{name} {value}".encode())
        return digest.digest()


@dataclass(frozen=True, eq=False)
class Batch:
    """B samples.

    Attributes:
        samples: The samples.
        split_name: The split of the user's dataset that they are from, such as "train"; "" where it is not known.
    """

    samples: Sequence[Sample]
    split_name: str = ""

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def __getitem__(self, row: int) -> Sample:
        return self.samples[row]

    @property
    def rows(self) -> list[int] | None:
        """B positions of the samples' rows in the user's dataset; None where one is not known."""
        found = [sample.row for sample in self.samples if sample.row is not None]
        return found if len(found) == len(self) else None

    @property
    def labels(self) -> NDArray[np.float64] | None:
        """(B,) what each row says of its one completion; None where one says nothing."""
        found = [sample.label for sample in self.samples if sample.label is not None]
        return np.array(found, np.float64) if len(found) == len(self) else None

    @property
    def num_tokens(self) -> IntArray:
        """(B,) tokens of each sample, the prompt counted once."""
        return _integers(sample.num_tokens for sample in self.samples)

    @property
    def prompt_lengths(self) -> IntArray:
        """(B,) tokens of each prompt."""
        return _integers(len(sample.prompt_ids) for sample in self.samples)

    @property
    def chosen_lengths(self) -> IntArray:
        """(B,) tokens of each sample's first completion."""
        return _integers(len(sample.completions[0]) for sample in self.samples)

    @property
    def rejected_lengths(self) -> IntArray:
        """(B,) tokens of each sample's second completion; 0 where there is none."""
        return _integers(sum(map(len, sample.completions[1:2])) for sample in self.samples)

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest sequence prompt + completion."""
        return max(sample.longest_sequence for sample in self.samples)

    @property
    def chosen_scored(self) -> IntArray:
        """(B,) tokens of each sample's first completion that are scored."""
        return _integers(sample.num_scored[0] for sample in self.samples)

    @property
    def rejected_scored(self) -> IntArray:
        """(B,) tokens of each sample's second completion that are scored; 0 where there is none."""
        return _integers(sum(sample.num_scored[1:2]) for sample in self.samples)

    def split(self, size: int | None) -> Iterator[Batch]:
        """Cut into consecutive batches of at most `size` samples (None: one batch)."""
        size = size or len(self)
        for start in range(0, len(self), size):
            yield replace(self, samples=self.samples[start : start + size])

    def select(self, rows: Sequence[int]) -> Batch:
        """The batch of these samples."""
        return replace(self, samples=[self.samples[row] for row in rows])

    def keys(self) -> list[bytes]:
        """One digest for each sample; see `Sample.key`."""
        return [sample.key for sample in self.samples]


def _integers(values: Iterator[int]) -> IntArray:
    return np.fromiter(values, np.int64)
