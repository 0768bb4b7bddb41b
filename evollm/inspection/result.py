"""The result of an inspection as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from evollm.data.row_report import DataReport
from evollm.data.unpaired_rows import Balance
from evollm.inspection.forecast import Forecast


@dataclass(frozen=True)
class Lengths:
    """Percentiles of lengths in tokens over the rows, and the largest length."""

    p50: int
    p90: int
    p99: int
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Lengths:
        """Compute them from at least one length; each percentile is one of the lengths."""
        p50, p90, p99 = np.percentile(lengths, [50, 90, 99], method="higher")
        return cls(int(p50), int(p90), int(p99), int(max(lengths)))


@dataclass(frozen=True)
class Fit:
    """The effect of a `max_context_length` on the rows.

    Attributes:
        limit: The length, in tokens of the prompt and the longer completion.
        prompts_cut: Rows whose prompt would be truncated on its left.
        too_long: Rows that would be dropped, since their completion does not fit.
    """

    limit: int
    prompts_cut: int
    too_long: int


@dataclass(frozen=True)
class SetShare:
    """One of several sets of rows, and its share of an epoch.

    Attributes:
        weight: Its weight.
        rows: Rows that are used.
        num_dropped: Rows that are not.
        drawn: Rows of the set in an epoch; 0 where a set has no row, so that there is no epoch.
        num_tokens: Tokens of the rows that are used, each prompt counted once.
    """

    weight: float
    rows: int
    num_dropped: int
    drawn: int
    num_tokens: int

    @property
    def epoch_tokens(self) -> float:
        """Tokens of the set in an epoch, on average over epochs."""
        return self.num_tokens * self.drawn / self.rows if self.rows else 0.0


@dataclass(frozen=True)
class RenderedRow:
    """A row as the model gets it, decoded with special tokens.

    Attributes:
        row: The row's position in the dataset, or in its set.
        prompt: The prompt, none of whose tokens are scored.
        chosen: The chosen side, or the completion of an example. Its tokens are scored, except those between `▐` and
            `▌`, which are turns of other roles than the assistant. None for a prompt alone.
        rejected: The rejected side in the same form; None for an example.
        num_scored: Number of scored tokens of both sides.
        set_name: Name of the row's set, where there are several.
    """

    row: int
    prompt: str
    chosen: str | None
    rejected: str | None
    num_scored: int
    set_name: str = ""


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect_data`. Counts and lengths are those of the used rows, before prompts are truncated.

    Attributes:
        report: Rows kept and dropped with the reasons, and the number of truncated prompts.
        columns: The column of each role, such as `prompt`.
        unused: Columns that are not read; of prompts alone the columns that the reward functions get.
        lengths: Lengths in tokens of `prompt`, `chosen`, `rejected` and `whole`, the row with its prompt counted once;
            for examples of `prompt`, `completion` and `whole`; for prompts alone of `prompt`.
        num_tokens: Tokens of all rows, each prompt counted once.
        prompt_share: Share of these tokens that are prompts, which are computed once for both sides.
        limit: The `max_context_length` in effect, if any.
        fits: The effects of that limit, and of some usual ones.
        duplicates: Rows that equal an earlier row, token by token.
        repeated_prompts: Rows with the prompt of an earlier row.
        contradictions: Rows whose chosen and rejected sides are those of an earlier row, exchanged.
        overlap: Rows that are in the other dataset, too; None if there is none.
        chosen_longer: Share of the pairs whose chosen side is longer than the rejected one; None for examples.
        rejected_longer: Share of the pairs whose rejected side is longer; None for examples.
        examples: Three rows, decoded.
        forecast: Estimated memory and time of a run; None if the model is not known, and for prompts alone.
        balance: For answers with labels how many of them are desirable; else None.
        sets: With `dataset_weights` the share of each set; else empty.
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
    balance: Balance | None = None
    sets: Mapping[str, SetShare] = field(default_factory=dict)
