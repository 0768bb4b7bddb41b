"""Samples of token ids, each a prompt and its completions, and batches of samples."""

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
        ids: (C,) token ids including the end tokens: one EOS after a string, and after messages the end that the chat
            template writes.
        mask: (C,) True where a token is scored; for a completion with several roles, the assistant's turns. None: all
            tokens are scored.
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
        """Number of scored tokens."""
        return len(self.ids) if self.mask is None else int(self.mask.sum())


@dataclass(frozen=True, eq=False)
class Sample:
    """A prompt and k completions: one in an SFT example; the chosen, then the rejected one in a preference pair.

    A prompt that is still to be answered has none.

    Attributes:
        prompt_ids: (P,) token ids, at least one.
        completions: The k completions.
        row: Position of the sample's row in the user's dataset; None if the sample is from no dataset.
        extras: Further data for an objective, by name, such as a `label` of a single completion.
        set_name: Name of the row's set, in whose dataset `row` is its position, where there are several; "" otherwise.

    Raises:
        DataError: The prompt or a completion has no token.
    """

    prompt_ids: IntArray
    completions: tuple[Completion, ...]
    row: int | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)
    set_name: str = ""

    def __post_init__(self) -> None:
        if not len(self.prompt_ids) or not all(map(len, self.completions)):
            sizes = len(self.prompt_ids), *map(len, self.completions)
            raise DataError("sample", sizes, "must have a prompt of at least one token, and no completion without any")

    @classmethod
    def of(cls, prompt_ids: IntArray, *completion_ids: IntArray, row: int | None = None) -> Sample:
        """A sample in which all completion tokens are scored."""
        return cls(prompt_ids, tuple(Completion(ids) for ids in completion_ids), row)

    @property
    def chosen_ids(self) -> IntArray:
        """(C,) ids of the first completion, the chosen one of a pair."""
        return self.completions[0].ids

    @property
    def rejected_ids(self) -> IntArray:
        """(R,) ids of the second completion, the rejected one of a pair; `IndexError` if there is none."""
        return self.completions[1].ids

    @property
    def label(self) -> float | None:
        """The label of a single completion; None: the row has no label."""
        return self.extras.get(LABEL)

    @property
    def token_ids(self) -> IntArray:
        """(P + C + ...,) ids of the prompt, then of each completion."""
        return np.concatenate([self.prompt_ids, *(completion.ids for completion in self.completions)])

    @cached_property
    def id_range(self) -> tuple[int, int]:
        """The smallest and the largest token id."""
        ids = self.token_ids
        return int(ids.min()), int(ids.max())

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the sample, with the prompt counted once."""
        return len(self.prompt_ids) + sum(map(len, self.completions))

    @property
    def longest_sequence(self) -> int:
        """Number of tokens in the longest sequence prompt + completion."""
        return len(self.prompt_ids) + max(map(len, self.completions), default=0)

    @property
    def num_scored(self) -> tuple[int, ...]:
        """Number of scored tokens in each completion."""
        return tuple(completion.num_scored for completion in self.completions)

    @property
    def masks(self) -> tuple[BoolArray, ...]:
        """For each completion (C,) True where a token is scored."""
        return tuple(completion.scored for completion in self.completions)

    @property
    def has_mask(self) -> bool:
        """Whether some token of a completion is not scored."""
        return any(completion.mask is not None for completion in self.completions)

    def with_mask(self, mask: BoolArray) -> Sample:
        """A copy whose scored tokens are given by the concatenated masks of all completions."""
        ends = np.cumsum([len(completion) for completion in self.completions])[:-1]
        parts = zip(self.completions, np.split(mask, ends), strict=True)
        masked = (Completion(completion.ids, None if part.all() else part) for completion, part in parts)
        return replace(self, completions=tuple(masked))

    @cached_property
    def key(self) -> bytes:
        """Digest of the token ids, lengths, masks and extras: equal samples have equal keys."""
        digest = hashlib.blake2b(digest_size=16)
        parts = [self.prompt_ids, *(completion.ids for completion in self.completions)]
        if len(parts) == 2:  # noqa: PLR2004 - unchanged keys: an example has that of a pair with an empty rejected side
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
        split_name: Name of the samples' split, such as "train"; "" if unknown.
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
        """B positions of the samples' rows in the user's dataset; None if any position is unknown."""
        found = [sample.row for sample in self.samples if sample.row is not None]
        return found if len(found) == len(self) else None

    @property
    def labels(self) -> NDArray[np.float64] | None:
        """(B,) labels of the samples; None if any sample has no label."""
        found = [sample.label for sample in self.samples if sample.label is not None]
        return np.array(found, np.float64) if len(found) == len(self) else None

    @property
    def num_tokens(self) -> IntArray:
        """(B,) number of tokens in each sample, with the prompt counted once."""
        return _integers(sample.num_tokens for sample in self.samples)

    @property
    def prompt_lengths(self) -> IntArray:
        """(B,) number of tokens in each prompt."""
        return _integers(len(sample.prompt_ids) for sample in self.samples)

    @property
    def chosen_lengths(self) -> IntArray:
        """(B,) number of tokens in each sample's first completion; 0 if there is none."""
        return _integers(sum(map(len, sample.completions[:1])) for sample in self.samples)

    @property
    def rejected_lengths(self) -> IntArray:
        """(B,) number of tokens in each sample's second completion; 0 if there is none."""
        return _integers(sum(map(len, sample.completions[1:2])) for sample in self.samples)

    @property
    def longest_sequence(self) -> int:
        """Number of tokens in the longest sequence prompt + completion."""
        return max(sample.longest_sequence for sample in self.samples)

    @property
    def chosen_scored(self) -> IntArray:
        """(B,) number of scored tokens in each sample's first completion."""
        return _integers(sample.num_scored[0] for sample in self.samples)

    @property
    def rejected_scored(self) -> IntArray:
        """(B,) number of scored tokens in each sample's second completion; 0 if there is none."""
        return _integers(sum(sample.num_scored[1:2]) for sample in self.samples)

    def split(self, size: int | None) -> Iterator[Batch]:
        """Split into consecutive batches of at most `size` samples (None: one batch)."""
        size = size or len(self)
        for start in range(0, len(self), size):
            yield replace(self, samples=self.samples[start : start + size])

    def select(self, rows: Sequence[int]) -> Batch:
        """The batch of the samples at these rows of the batch."""
        return replace(self, samples=[self.samples[row] for row in rows])

    def keys(self) -> list[bytes]:
        """One digest for each sample; see `Sample.key`."""
        return [sample.key for sample in self.samples]


def _integers(values: Iterator[int]) -> IntArray:
    return np.fromiter(values, np.int64)
