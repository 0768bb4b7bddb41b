"""Conversion of batches to padded observations of a gymnasium environment, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from evollm.data.samples import LABEL, Batch, IntArray, Sample
from evollm.errors import DataError

Observation: TypeAlias = dict[str, NDArray[Any]]

LENGTHS = ("prompt_lengths", "chosen_lengths", "rejected_lengths")
IDS, MASK, LABELS = "input_ids", "scored_mask", "labels"


@dataclass(frozen=True)
class ObservationShape:
    """The shapes and optional keys of an environment's observations.

    Attributes:
        num_rows: Rows of an observation, rows without a sample included.
        row_length: Tokens of a row, padding included.
        with_mask: Whether observations have a `scored_mask`.
        with_labels: Whether observations have `labels`.
    """

    num_rows: int
    row_length: int
    with_mask: bool = False
    with_labels: bool = False

    @classmethod
    def of(cls, samples: Batch, num_rows: int) -> ObservationShape:
        """The shape of observations that can hold any of these samples."""
        row_length = int(samples.num_tokens.max())
        return cls(num_rows, row_length, any(sample.has_mask for sample in samples), samples.labels is not None)

    def space(self, largest_id: int) -> spaces.Space[Observation]:
        """The space of observations with ids up to `largest_id`."""
        table = self.num_rows, self.row_length
        found: dict[str, spaces.Space[Any]] = {IDS: spaces.Box(0, largest_id, table, np.int64)}
        found |= {name: spaces.Box(0, self.row_length, (self.num_rows,), np.int64) for name in LENGTHS}
        if self.with_mask:
            found[MASK] = spaces.MultiBinary(table)
        if self.with_labels:
            found[LABELS] = spaces.Box(-np.inf, np.inf, (self.num_rows,), np.float64)
        # gymnasium's annotation of Dict says that its samples are dictionaries of spaces.
        return cast("spaces.Space[Observation]", spaces.Dict(found))

    def observation(self, batch: Batch) -> Observation:
        """Pad a batch of samples with one or two completions with zeros.

        Returns:
            `input_ids` (num_rows, row_length) with `prompt | chosen | rejected` in each row, and three lengths
            (num_rows,), which are 0 for a row without a sample; `rejected_lengths` is also 0 without a second
            completion. If samples have masks or labels, also `scored_mask` (num_rows, row_length) in int8 or
            `labels` (num_rows,).
        """
        table = self.num_rows, self.row_length
        found: Observation = {IDS: np.zeros(table, np.int64)}
        found |= {name: np.zeros(self.num_rows, np.int64) for name in LENGTHS}
        for name in LENGTHS:
            found[name][: len(batch)] = getattr(batch, name)
        if self.with_mask:
            found[MASK] = np.zeros(table, np.int8)
        if self.with_labels:
            found[LABELS] = np.zeros(self.num_rows)
            found[LABELS][: len(batch)] = batch.labels
        for row, sample in enumerate(batch):
            found[IDS][row, : sample.num_tokens] = sample.token_ids
            if self.with_mask:
                found[MASK][row, len(sample.prompt_ids) : sample.num_tokens] = np.concatenate(sample.masks)
        return found


def batch_of(experiences: Batch | Mapping[str, Any]) -> Batch:
    """Convert an observation to a batch, leaving out rows without a sample; a batch is returned unchanged.

    Raises:
        DataError: A key is missing, an array does not have an observation's shape or type, no row holds a sample, or a
            completion has no scored token.
    """
    if isinstance(experiences, Batch):
        return experiences
    if not isinstance(experiences, Mapping):
        raise DataError("experiences", type(experiences).__name__, "pass a batch or an observation of the gym")
    missing = [name for name in (IDS, *LENGTHS) if name not in experiences]
    if missing:
        raise DataError("experiences", list(experiences), f"lacks {missing}; pass an observation of the gym")
    ids, *lengths = (_as_array(name, experiences[name]).astype(np.int64, copy=False) for name in (IDS, *LENGTHS))
    _check_shapes(ids, lengths)
    present = np.flatnonzero(lengths[0])
    if not len(present):
        raise DataError("experiences", "no pair", "the observation after an epoch's end is empty: call env.reset()")
    mask = _optional(experiences, MASK, "bui", ids.shape)
    labels = _optional(experiences, LABELS, "buif", lengths[0].shape)
    samples = []
    for row in present:
        sizes = [int(length[row]) for length in lengths]
        if not sizes[1]:
            raise DataError("experiences['chosen_lengths']", 0, "of a row with a prompt: there is nothing to score")
        parts = np.split(ids[row], np.cumsum(sizes))
        sample = Sample.of(*parts[: 3 if sizes[2] else 2])
        if mask is not None:
            sample = sample.with_mask(mask[row, sizes[0] : sample.num_tokens].astype(np.bool_))
        if labels is not None:
            sample = replace(sample, extras={LABEL: float(labels[row])})
        samples.append(sample)
    if not all(all(sample.num_scored) for sample in samples):
        raise DataError(f"experiences[{MASK!r}]", "no token", "of a completion is scored")
    return Batch(samples)


def as_action(numbers: NDArray[Any], experiences: Batch | Mapping[str, Any]) -> NDArray[np.float32]:
    """Expand numbers per sample to (num_rows,) numbers per row of an observation; 0 for rows without a sample."""
    numbers = numbers.astype(np.float32)
    if isinstance(experiences, Batch):
        return numbers
    present = np.asarray(experiences[LENGTHS[0]]) > 0
    action = np.zeros(len(present), dtype=np.float32)
    action[present] = numbers
    return action


def _as_array(name: str, values: Any, kinds: str = "ui") -> NDArray[Any]:
    """Convert values to a NumPy array; a tensor on any device is copied to main memory if needed."""
    what = "must be numbers" if "f" in kinds else "must be whole numbers"
    try:
        array = np.asarray(values.cpu() if hasattr(values, "cpu") else values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"experiences[{name!r}]", type(values).__name__, f"{what} ({error})") from None
    if array.dtype.kind not in kinds:
        raise DataError(f"experiences[{name!r}]", str(array.dtype), what)
    return array


def _optional(experiences: Mapping[str, Any], name: str, kinds: str, shape: tuple[int, ...]) -> NDArray[Any] | None:
    """An array under an optional key of an observation; None if the key is missing."""
    if name not in experiences:
        return None
    array = _as_array(name, experiences[name], kinds)
    if array.shape != shape:
        raise DataError(f"experiences[{name!r}]", array.shape, f"must have the shape {shape}")
    return array


def _check_shapes(ids: IntArray, lengths: list[IntArray]) -> None:
    """Raise unless `ids` has a row for each length, and columns for the sum of each row's lengths."""
    count = len(lengths[0]) if lengths[0].shape else 0
    fits = ids.ndim == 2 and len(ids) == count and all(array.shape == (count,) for array in lengths)  # noqa: PLR2004
    if not fits:
        shapes = {name: array.shape for name, array in zip((IDS, *LENGTHS), (ids, *lengths), strict=True)}
        raise DataError("experiences", shapes, "must be (B, L) input_ids and three times (B,) lengths")
    if any((array < 0).any() for array in lengths) or (sum(lengths, np.zeros(count, np.int64)) > ids.shape[1]).any():
        raise DataError("experiences", "lengths", "are negative, or more than the columns of input_ids")
