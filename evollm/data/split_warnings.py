"""What is said of the splits of a gym: learnable, but hardly what is meant. Each is called by the gym's constructor."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import combinations

from evollm.data.row_report import DataReport, count_seen
from evollm.data.samples import Sample


def warn_of_plain_text(report: DataReport) -> None:
    """Warn of strings where the tokenizer has a chat template that its model answers in."""
    if report.template_hint:
        warnings.warn(
            "the rows are strings, which do not go through the chat template that the tokenizer has, and an instruct "
            f"model answers in. For turns of it {report.template_hint}. For plain text set "
            "tokenizer.chat_template = None",
            UserWarning,
            stacklevel=3,
        )


def warn_of_templates(reports: Mapping[str, DataReport]) -> None:
    """Warn of chat rows that a template does not write out as they read."""
    found = [f"{name}: {'; '.join(remarks)}" for name, report in reports.items() if (remarks := report.remarks)]
    if found:
        warnings.warn(
            f"chat rows are learnt from otherwise than they read ({'. '.join(found)}). Correct these rows, or set "
            "tokenizer.chat_template to one that writes them out; `evollm inspect` shows what is scored",
            UserWarning,
            stacklevel=4,
        )


def warn_of_overlap(pairs: Mapping[str, Sequence[Sample]], noun: str) -> None:
    """Warn of rows that are in two of the splits."""
    for first, second in combinations(pairs, 2):
        count = count_seen(pairs[second], pairs[first])
        if count:
            warnings.warn(
                f"{count} of {len(pairs[second])} {noun}s of {second}_dataset are in {first}_dataset too: a score on "
                f"them says nothing about new {noun}s; split the data by prompt",
                UserWarning,
                stacklevel=4,
            )
