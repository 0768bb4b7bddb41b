"""What an inspection found, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evollm.data.row_report import DataReport
from evollm.inspection.forecast import Forecast


@dataclass(frozen=True)
class Lengths:
    """How long something is, in tokens: percentiles over the rows, and the longest."""

    p50: int
    p90: int
    p99: int
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Lengths:
        """The percentiles of at least one length, each of them one of the lengths."""
        p50, p90, p99 = np.percentile(lengths, [50, 90, 99], method="higher")
        return cls(int(p50), int(p90), int(p99), int(max(lengths)))


@dataclass(frozen=True)
class Fit:
    """What a `max_context_length` would do to the rows.

    Attributes:
        limit: The length, in tokens of prompt and longer completion.
        prompts_cut: Rows whose prompt would lose tokens on its left.
        too_long: Rows that would be dropped: their completion does not fit.
    """

    limit: int
    prompts_cut: int
    too_long: int


@dataclass(frozen=True)
class RenderedRow:
    """A row as the model sees it, special tokens written out.

    Attributes:
        row: Its position in the dataset.
        prompt: What is given. None of its tokens is scored.
        chosen: The chosen side, or the completion of an example. All of it is scored but what stands between `▐` and
            `▌`: turns that are not the assistant's.
        rejected: The rejected side, likewise; None for an example.
        num_scored: Tokens that are scored, of both sides.
    """

    row: int
    prompt: str
    chosen: str
    rejected: str | None
    num_scored: int


@dataclass(frozen=True)
class Inspection:
    """What evollm understood of a dataset. Counts and lengths are those of the rows that are used, before any cut.

    Attributes:
        report: Rows kept and dropped with the reasons, and the prompts that were cut.
        columns: For each role that columns have, such as `prompt`, the column that has it.
        unused: The other columns.
        lengths: In tokens: `prompt`, `chosen`, `rejected`, and `whole`, the row with its prompt counted once. Of
            examples `prompt`, `completion` and `whole`.
        num_tokens: Tokens of all rows, each prompt counted once.
        prompt_share: Share of them that are prompts, which are computed once for both sides.
        limit: The `max_context_length` that holds, if any.
        fits: What that one and some usual ones would do.
        duplicates: Rows that are, token for token, an earlier row.
        repeated_prompts: Rows whose prompt an earlier row has.
        contradictions: Rows that prefer the other way round what an earlier row says.
        overlap: Rows that are in the other dataset too; None when there is none to compare with.
        chosen_longer: Share of the pairs whose chosen side is longer than the rejected one; None of examples.
        rejected_longer: The same for the rejected side.
        examples: Three rows as the model sees them.
        forecast: Memory and time that a run would take, as far as they were asked for and the model is known.
    """

    report: DataReport
    columns: Mapping[str, str]
    unused: tuple[str, ...]
    lengths: Mapping[str, Lengths]
    num_tokens: int
    prompt_share: float
    limit: int | None
    fits: tuple[Fit, ...]
    duplicates: int
    repeated_prompts: int
    contradictions: int
    overlap: int | None
    chosen_longer: float | None
    rejected_longer: float | None
    examples: tuple[RenderedRow, ...]
    forecast: Forecast | None
