"""Columns of a dataset that would not be used although somebody meant them to be."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

# Names under which other datasets keep the prompt: read past, they would leave rows without their question.
PROMPT_ALIASES = ("question", "instruction", "query", "input", "prompts", "context")
IMAGE_COLUMNS = ("image", "images")
# Columns that a dataset need not have, so that nobody would notice that they are not read.
OPTIONAL = ("prompt", "tools", "chat_template_kwargs")
# Those that hold whole texts, beside which there is no prompt.
WITHOUT_PROMPT = ("messages", "conversations", "text")

# How alike names are, from 0 to 1. A column that is not needed must be very like one that is known to be taken for it:
# a dataset may well have a prompt_id.
_MISSING_LIKE, _UNUSED_LIKE = 0.6, 0.85


def missing_hint(missing: Sequence[str], columns: Sequence[str], known: Collection[str]) -> str:
    """Which of the columns that are there may have been meant for those that are missing."""
    strangers = _strangers(columns, known)
    pairs = [(_nearest(name, strangers, _MISSING_LIKE), name) for name in missing]
    hints = [f"is {column!r} meant to be {name!r}?" for column, name in pairs if column is not None]
    return f" ({' '.join(hints)})" if hints else ""


def unused_column(columns: Sequence[str], known: Collection[str]) -> str:
    """What is wrong with a dataset that has all columns it needs: one that would be left unused by mistake; or ""."""
    images = [name for name in IMAGE_COLUMNS if name in columns]
    if images:
        return f"has a column {images[0]!r}, and evollm tunes on text alone; leave it out if the text makes sense so"
    optional = [name for name in OPTIONAL if name in known and name not in columns]
    if any(name in columns for name in WITHOUT_PROMPT if name in known):
        optional = [name for name in optional if name != "prompt"]
    alias = next((name for name in PROMPT_ALIASES if name in columns), None)
    if alias is not None and "prompt" in optional:
        return f"has a column {alias!r} that would not be used; rename it to prompt"
    strangers = _strangers(columns, known)
    for name in optional:
        column = _nearest(name, strangers, _UNUSED_LIKE)
        if column is not None:
            return f"has a column {column!r} that would not be used; rename it to {name}, or leave it out"
    return ""


def _strangers(columns: Sequence[str], known: Collection[str]) -> list[str]:
    return [column for column in columns if isinstance(column, str) and column not in known]


def _nearest(name: str, columns: Sequence[str], cutoff: float) -> str | None:
    """The column whose name is most like this one, whatever its case."""
    plain = {column.strip().lower(): column for column in columns}
    found = difflib.get_close_matches(name, plain, 1, cutoff)
    return plain[found[0]] if found else None
