"""Batches as observations of a gymnasium environment, padded to fixed shapes, and back."""

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
    """What the observations of an environment have in common.

    Attributes:
        num_rows: Rows of an observation, those without a sample included.
        row_length: Tokens of a row, padding included.
        with_mask: Whether there is a `scored_mask`.
        with_labels: Whether there are `labels`.
    """

    num_rows: int
    row_length: int
    with_mask: bool = False
    with_labels: bool = False

    @classmethod
    def of(cls, samples: Batch, num_rows: int) -> ObservationShape:
        """The shape that has room for any of these samples."""
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
        # gymnasium types the samples of a Dict as a dictionary of spaces.
        return cast("spaces.Space[Observation]", spaces.Dict(found))

    def observation(self, batch: Batch) -> Observation:
        """A batch of samples with one or two completions, padded with zeros.

        Returns:
            `input_ids` (num_rows, row_length) with `prompt | chosen | rejected` in each row, and three lengths
            (num_rows,), which are 0 for a row without a sample, and without a second completion. Also `scored_mask`
            (num_rows, row_length) in int8 and `labels` (num_rows,), where samples have them.
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
    """The batch that was handed in, or that of an observation, without the rows that hold no sample.

    Raises:
        DataError: A key is missing, an array has not the shape or the type of an observation's, or no row holds a
            sample.
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
    """One number for each sample -> one for each row of an observation, (num_rows,), 0 for rows without a sample."""
    numbers = numbers.astype(np.float32)
    if isinstance(experiences, Batch):
        return numbers
    present = np.asarray(experiences[LENGTHS[0]]) > 0
    action = np.zeros(len(present), dtype=np.float32)
    action[present] = numbers
    return action


def _as_array(name: str, values: Any, kinds: str = "ui") -> NDArray[Any]:
    """The values in main memory, wherever a tensor of them lies."""
    what = "must be numbers" if "f" in kinds else "must be whole numbers"
    try:
        array = np.asarray(values.cpu() if hasattr(values, "cpu") else values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"experiences[{name!r}]", type(values).__name__, f"{what} ({error})") from None
    if array.dtype.kind not in kinds:
        raise DataError(f"experiences[{name!r}]", str(array.dtype), what)
    return array


def _optional(experiences: Mapping[str, Any], name: str, kinds: str, shape: tuple[int, ...]) -> NDArray[Any] | None:
    """An array that not every observation has."""
    if name not in experiences:
        return None
    array = _as_array(name, experiences[name], kinds)
    if array.shape != shape:
        raise DataError(f"experiences[{name!r}]", array.shape, f"must have the shape {shape}")
    return array


def _check_shapes(ids: IntArray, lengths: list[IntArray]) -> None:
    """Raise unless the arrays are a batch's: a row of ids for each of the lengths, and room for what they say."""
    count = len(lengths[0]) if lengths[0].shape else 0
    fits = ids.ndim == 2 and len(ids) == count and all(array.shape == (count,) for array in lengths)  # noqa: PLR2004
    if not fits:
        shapes = {name: array.shape for name, array in zip((IDS, *LENGTHS), (ids, *lengths), strict=True)}
        raise DataError("experiences", shapes, "must be (B, L) input_ids and three times (B,) lengths")
    if any((array < 0).any() for array in lengths) or (sum(lengths, np.zeros(count, np.int64)) > ids.shape[1]).any():
        raise DataError("experiences", "lengths", "are negative, or more than the columns of input_ids")
