"""The one batch type: preference pairs as token ids. An SFT example is a pair without a rejected side."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evollm.errors import DataError

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

FIELDS = ("input_ids", "prompt_lengths", "chosen_lengths", "rejected_lengths")
# Of batches with turns in a completion that are not the assistant's.
MASK = "scored_mask"


@dataclass(frozen=True)
class TokenizedPair:
    """One preference pair; both sides continue the same prompt tokens. An SFT example has no rejected side.

    Attributes:
        prompt_ids: (P,) token ids, at least one.
        chosen_ids: (C,) token ids of the preferred completion, with what ends it: one EOS after a string, and after
            messages whatever the chat template writes.
        rejected_ids: (R,) token ids of the other completion, likewise; R is 0 for an SFT example.
        row: Position of its row in the user's dataset, where there is one.
        chosen_mask: (C,) True where a token is scored: what the assistant says, of a completion in which others speak
            too. None: all of them.
        rejected_mask: (R,) likewise.
        label: What the row says of its one completion; None: nothing.
    """

    prompt_ids: IntArray
    chosen_ids: IntArray
    rejected_ids: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    row: int | None = field(default=None, kw_only=True)
    chosen_mask: BoolArray | None = field(default=None, kw_only=True)
    rejected_mask: BoolArray | None = field(default=None, kw_only=True)
    label: float | None = field(default=None, kw_only=True)

    @property
    def token_ids(self) -> IntArray:
        """(P + C + R,) all ids: `prompt | chosen | rejected`."""
        return np.concatenate([self.prompt_ids, self.chosen_ids, self.rejected_ids])

    @property
    def num_tokens(self) -> int:
        """Tokens of the pair with the prompt counted once."""
        return len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)

    @property
    def masks(self) -> tuple[BoolArray, BoolArray]:
        """(C,) and (R,) True where a token is scored."""
        sides = ((self.chosen_ids, self.chosen_mask), (self.rejected_ids, self.rejected_mask))
        chosen, rejected = (np.ones(len(ids), np.bool_) if mask is None else mask for ids, mask in sides)
        return chosen, rejected

    @property
    def num_scored(self) -> tuple[int, int]:
        """Tokens of each side that are scored."""
        chosen, rejected = self.masks
        return int(chosen.sum()), int(rejected.sum())

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longer of the two sequences prompt + completion."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))

    def with_mask(self, mask: BoolArray) -> TokenizedPair:
        """The pair with what is scored of its completions, (C + R,)."""
        chosen, rejected = np.split(mask, [len(self.chosen_ids)])
        return replace(
            self,
            chosen_mask=None if chosen.all() else chosen,
            rejected_mask=None if rejected.all() else rejected,
        )

    def key(self) -> bytes:
        """Digest of the token ids, the lengths, what is not scored and the label: equal pairs have equal keys."""
        digest = hashlib.blake2b(digest_size=16)
        for ids in (self.prompt_ids, self.chosen_ids, self.rejected_ids):
            digest.update(len(ids).to_bytes(8, "little") + np.ascontiguousarray(ids).tobytes())
        if self.chosen_mask is not None or self.rejected_mask is not None:
            digest.update(np.concatenate(self.masks).tobytes())
        if self.label is not None:
            digest.update(f"label {self.label}".encode())
        return digest.digest()


@dataclass(frozen=True)
class PreferenceBatch:
    """B preference pairs; row i holds `prompt | chosen | rejected | padding`.

    Attributes:
        input_ids: (B, L) token ids. Padding is recognised by the lengths, never by its id.
        prompt_lengths: (B,) tokens of each prompt.
        chosen_lengths: (B,) tokens of each chosen completion, with what ends it.
        rejected_lengths: (B,) tokens of each rejected completion, with what ends it; 0 for SFT examples.
        rows: (B,) positions of the pairs' rows in the user's dataset; None where they are not known.
        split_name: The split of that dataset, such as "train"; "" where it is not known.
        scored_mask: (B, L) True at the completions' tokens that are scored; None: all of them are.
        labels: (B,) what each row says of its one completion; None: nothing. An observation does not hold them.
    """

    input_ids: IntArray
    prompt_lengths: IntArray
    chosen_lengths: IntArray
    rejected_lengths: IntArray
    rows: IntArray | None = field(default=None, kw_only=True)
    split_name: str = field(default="", kw_only=True)
    scored_mask: BoolArray | None = field(default=None, kw_only=True)
    labels: NDArray[np.float64] | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_tokens(self) -> IntArray:
        """(B,) tokens of each pair, the prompt counted once."""
        return self.prompt_lengths + self.chosen_lengths + self.rejected_lengths

    @property
    def chosen_scored(self) -> IntArray:
        """(B,) tokens of each chosen completion that are scored."""
        return self._num_scored(0)

    @property
    def rejected_scored(self) -> IntArray:
        """(B,) tokens of each rejected completion that are scored."""
        return self._num_scored(1)

    def _num_scored(self, side: int) -> IntArray:
        if self.scored_mask is None:
            return (self.chosen_lengths, self.rejected_lengths)[side]
        return np.array([self.pair(row).num_scored[side] for row in range(len(self))], dtype=np.int64)

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest sequence prompt + completion."""
        return int((self.prompt_lengths + np.maximum(self.chosen_lengths, self.rejected_lengths)).max())

    @classmethod
    def from_pairs(cls, pairs: Sequence[TokenizedPair], split_name: str = "") -> PreferenceBatch:
        """Lay pairs out as rows, padded with zeros to the longest row."""
        input_ids = np.zeros((len(pairs), max(pair.num_tokens for pair in pairs)), dtype=np.int64)
        for row, pair in zip(input_ids, pairs, strict=True):
            row[: pair.num_tokens] = pair.token_ids
        mask = None
        if any(pair.chosen_mask is not None or pair.rejected_mask is not None for pair in pairs):
            mask = np.zeros(input_ids.shape, np.bool_)
            for scored, pair in zip(mask, pairs, strict=True):
                scored[len(pair.prompt_ids) : pair.num_tokens] = np.concatenate(pair.masks)
        return cls(
            input_ids=input_ids,
            prompt_lengths=np.array([len(pair.prompt_ids) for pair in pairs], dtype=np.int64),
            chosen_lengths=np.array([len(pair.chosen_ids) for pair in pairs], dtype=np.int64),
            rejected_lengths=np.array([len(pair.rejected_ids) for pair in pairs], dtype=np.int64),
            rows=_of_all(pairs, "row", np.int64),
            split_name=split_name,
            scored_mask=mask,
            labels=_of_all(pairs, "label", np.float64),
        )

    @classmethod
    def from_experiences(cls, experiences: PreferenceBatch | Mapping[str, Any]) -> PreferenceBatch:
        """Accept a batch, or an observation of a gym (its absent rows are left out).

        Raises:
            DataError: A key is missing or no row holds a pair.
        """
        if isinstance(experiences, PreferenceBatch):
            return experiences
        if not isinstance(experiences, Mapping):
            raise DataError("experiences", type(experiences).__name__, "pass a batch or an observation of the gym")
        missing = [name for name in FIELDS if name not in experiences]
        if missing:
            raise DataError("experiences", list(experiences), f"lacks {missing}; pass an observation of the gym")
        arrays = {name: _as_array(name, experiences[name]) for name in FIELDS}
        _check_shapes(arrays)
        mask = None
        if MASK in experiences:
            mask = _as_array(MASK, experiences[MASK], "bui").astype(np.bool_)
            if mask.shape != arrays["input_ids"].shape:
                raise DataError(f"experiences[{MASK!r}]", mask.shape, "must have the shape of input_ids")
        present = arrays["prompt_lengths"] > 0
        if not present.any():
            raise DataError("experiences", "no pair", "the observation after an epoch's end is empty: call env.reset()")
        batch = cls(*(arrays[name][present] for name in FIELDS), scored_mask=None if mask is None else mask[present])
        if mask is not None and not (
            batch.chosen_scored.all() and ((batch.rejected_scored > 0) == (batch.rejected_lengths > 0)).all()
        ):
            raise DataError(f"experiences[{MASK!r}]", "no token", "of a completion is scored")
        return batch

    def to_observation(self, num_rows: int, row_length: int, *, with_mask: bool = False) -> dict[str, NDArray[Any]]:
        """Pad with zeros to the fixed shapes of an observation space.

        Returns:
            `input_ids` (num_rows, row_length) and three lengths (num_rows,); an absent row has lengths 0. With a mask
            also `scored_mask` (num_rows, row_length) in int8.
        """
        input_ids = np.zeros((num_rows, row_length), dtype=np.int64)
        input_ids[: len(self), : self.input_ids.shape[1]] = self.input_ids
        lengths = {name: np.zeros(num_rows, dtype=np.int64) for name in FIELDS[1:]}
        for name, padded in lengths.items():
            padded[: len(self)] = getattr(self, name)
        if not with_mask:
            return {"input_ids": input_ids, **lengths}
        mask = np.zeros((num_rows, row_length), dtype=np.int8)
        for row, scored in enumerate(mask[: len(self)]):
            start = self.prompt_lengths[row]
            scored[start : self.num_tokens[row]] = np.concatenate(self.pair(row).masks)
        return {"input_ids": input_ids, **lengths, MASK: mask}

    def pair(self, row: int) -> TokenizedPair:
        """Row `row` without its padding."""
        start, end = self.prompt_lengths[row], self.prompt_lengths[row] + self.chosen_lengths[row]
        stop = end + self.rejected_lengths[row]
        ids = self.input_ids[row]
        pair = TokenizedPair(ids[:start], ids[start:end], ids[end:stop])
        if self.labels is not None:
            pair = replace(pair, label=float(self.labels[row]))
        return pair if self.scored_mask is None else pair.with_mask(self.scored_mask[row, start:stop])

    def split(self, size: int | None) -> Iterator[PreferenceBatch]:
        """Cut into consecutive batches of at most `size` pairs (None: one batch)."""
        size = size or len(self)
        for start in range(0, len(self), size):
            yield self.select(slice(start, start + size))

    def select(self, rows: slice | Sequence[int]) -> PreferenceBatch:
        """The batch of these rows, without columns that only other rows needed."""
        rows = rows if isinstance(rows, slice) else list(rows)
        lengths = [getattr(self, name)[rows] for name in FIELDS[1:]]
        longest = int(sum(lengths).max())
        of_dataset = None if self.rows is None else self.rows[rows]
        ids = self.input_ids[rows][:, :longest]
        mask = None if self.scored_mask is None else self.scored_mask[rows][:, :longest]
        return PreferenceBatch(
            ids,
            *lengths,
            rows=of_dataset,
            split_name=self.split_name,
            scored_mask=mask,
            labels=None if self.labels is None else self.labels[rows],
        )

    def keys(self) -> list[bytes]:
        """One digest for each pair: equal pairs have equal keys; see `TokenizedPair.key`."""
        return [self.pair(row).key() for row in range(len(self))]


def _of_all(pairs: Sequence[TokenizedPair], name: str, dtype: type) -> NDArray[Any] | None:
    """(B,) values of a field that every pair has, else None."""
    values = [getattr(pair, name) for pair in pairs]
    return None if None in values else np.array(values, dtype=dtype)


def _as_array(name: str, values: Any, kinds: str = "ui") -> IntArray:
    """The values as integers in main memory, wherever a tensor of them lies."""
    try:
        array = np.asarray(values.cpu() if hasattr(values, "cpu") else values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"experiences[{name!r}]", type(values).__name__, f"must be whole numbers ({error})") from None
    if array.dtype.kind not in kinds:
        raise DataError(f"experiences[{name!r}]", str(array.dtype), "must be whole numbers")
    return array.astype(np.int64, copy=False)


def _check_shapes(arrays: Mapping[str, IntArray]) -> None:
    """Raise unless the arrays are a batch's: a row of ids for each of the lengths, and room for what they say."""
    shapes = {name: array.shape for name, array in arrays.items()}
    (ids, *lengths), count = arrays.values(), len(arrays["prompt_lengths"]) if shapes["prompt_lengths"] else 0
    fits = ids.ndim == 2 and len(ids) == count and all(array.shape == (count,) for array in lengths)  # noqa: PLR2004
    if not fits:
        raise DataError("experiences", shapes, "must be (B, L) input_ids and three times (B,) lengths")
    if any((array < 0).any() for array in lengths) or (sum(lengths, np.zeros(count, np.int64)) > ids.shape[1]).any():
        raise DataError("experiences", "lengths", "are negative, or more than the columns of input_ids")
