"""Rows with one completion and a label, desirable or not: unpaired preferences. A pair is read as two of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from evollm.data.cells import Row, UnusableRowError, is_missing
from evollm.data.completion_rows import EXAMPLES
from evollm.data.pairs import ChatPair, TextPair
from evollm.data.preference_rows import PAIRS
from evollm.data.rows import DroppedRows, RowFormat, read_dataset
from evollm.data.samples import LABEL, Sample
from evollm.data.shapes import UNPAIRED as UNPAIRED_SHAPES

DESIRABLE, UNDESIRABLE = 1.0, 0.0
NO_LABEL = "label is missing"
# Desirable rows times their weight, divided by undesirable rows times theirs (KTO, arXiv 2402.01306, equation 8).
SMALLEST_RATIO, LARGEST_RATIO = 1.0, 4 / 3
# A ratio that is further from these bounds than by this factor is worth a warning.
TOLERATED = 1.5


def read_unpaired(dataset: object, field: str) -> tuple[list[TextPair | ChatPair], DroppedRows]:
    """Read completions with labels.

    Args:
        dataset: What [`evollm.data.rows.read_dataset`][] takes. The columns are those of
            [`evollm.data.completion_rows.read_examples`][] and `label`: true or 1 for a desirable completion, false or
            0 for an undesirable one, as TRL has them; of a CSV file also their text. Other values need
            `columns={"label": {"column": ..., "good": ..., "bad": ...}}`. Or the columns `chosen` and `rejected` of
            [`evollm.data.preference_rows.read_pairs`][]: a pair is two answers, the chosen side a desirable one.
        field: The user's name for the dataset, for messages.

    Returns:
        The completions with their `label`, and the pairs, in the dataset's order; and for each reason the positions of
        the dropped rows, such as those whose label is missing.

    Raises:
        DataError: The dataset cannot be read, lacks a column, has no row, or has a label that says neither.
    """
    return read_dataset(dataset, field, UNPAIRED)


def _to_unpaired(number: int, row: Row) -> TextPair | ChatPair:
    if "chosen" in row:
        return PAIRS.read(number, row)
    if is_missing(row["label"]):
        raise UnusableRowError(NO_LABEL)
    example = EXAMPLES.read(number, {**row, "label": True})
    return replace(example, label=DESIRABLE if row["label"] else UNDESIRABLE)


def _divided(sample: Sample) -> tuple[Sample, ...]:
    """The two sides of a pair as samples with labels; a sample with one completion as it is."""
    if len(sample.completions) == 1:
        return (sample,)
    sides = zip(sample.completions, (DESIRABLE, UNDESIRABLE), strict=True)
    return tuple(replace(sample, completions=(side,), extras={**sample.extras, LABEL: label}) for side, label in sides)


UNPAIRED = RowFormat("answer", UNPAIRED_SHAPES, _to_unpaired, divided=_divided)


@dataclass(frozen=True)
class Balance:
    """How many answers are desirable and undesirable."""

    desirable: float
    undesirable: float

    @classmethod
    def of(cls, labels: Sequence[float | None]) -> Balance:
        """Count labels."""
        desirable = sum(label == DESIRABLE for label in labels)
        return cls(desirable, len(labels) - desirable)

    @property
    def lacks_a_class(self) -> bool:
        """Whether all answers have the same label."""
        return not self.desirable or not self.undesirable

    def is_strong(self, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> bool:
        """Whether weighted counts are far from the ratio that the paper recommends."""
        ratio = self.desirable * desirable_weight / (self.undesirable * undesirable_weight)
        return not SMALLEST_RATIO / TOLERATED <= ratio <= LARGEST_RATIO * TOLERATED

    def advice(self, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> str:
        """The weights that the paper recommends (arXiv 2402.01306, equation 8), one of them as it is.

        They keep `desirable_weight` times the desirable answers between 1 and 4/3 times the undesirable ones with
        theirs.
        """
        ratio = self.desirable / self.undesirable
        first = [bound * undesirable_weight / ratio for bound in (SMALLEST_RATIO, LARGEST_RATIO)]
        second = [ratio * desirable_weight / bound for bound in (LARGEST_RATIO, SMALLEST_RATIO)]
        return (
            f"either desirable_weight from {first[0]:.3g} to {first[1]:.3g} or undesirable_weight from {second[0]:.3g} "
            f"to {second[1]:.3g}"
        )

    def __str__(self) -> str:
        return f"{round(self.desirable)} desirable and {round(self.undesirable)} undesirable answers"
