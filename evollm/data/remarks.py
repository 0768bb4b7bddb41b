"""What is strange about rows that are used, counted for the row report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evollm.data.row_report import FIRST_ROWS, listed, mixture_warning
from evollm.data.rows import ChatPair, Rows, TextPair, in_form

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of a special token, in characters: shorter ones may well stand in a text.
_SHORTEST = 3


def remarks_on(pairs: Sequence[TextPair | ChatPair]) -> str:
    """What to know of a dataset; "" when nothing is strange."""
    found: dict[str, list[int]] = {}
    for pair in pairs:
        for remark in pair.remarks:
            found.setdefault(remark, []).append(pair.row)
    counted = [f"{len(rows)} with {remark}: {listed(len(rows), rows[:FIRST_ROWS])}" for remark, rows in found.items()]
    return "; ".join(filter(None, (mixture_warning(pairs), *counted)))


def plain_text(pairs: Sequence[TextPair | ChatPair], rows: Rows, tokenizer: PreTrainedTokenizerBase) -> str:
    """What to do about rows of strings where the tokenizer has a chat template, which they do not go through.

    Args:
        pairs: The rows that are used.
        rows: All of them.
        tokenizer: The model's tokenizer.

    Returns:
        "" where there is nothing to do: there is no template or a row of messages, the strings hold marks of the
        template themselves, or they are texts to learn from their first token on.
    """
    if not tokenizer.chat_template or not pairs:
        return ""
    if any(isinstance(in_form(pair, has_template=True), ChatPair) for pair in pairs):
        return ""
    roles = rows.layouts[0].roles
    if "text" in roles or _is_written(pairs[0], tokenizer):
        return ""
    if "prompt" not in roles:
        return 'hand in messages: {"prompt": [{"role": "user", "content": ...}], "chosen": [...], "rejected": [...]}'
    column = roles["prompt"]
    return (
        f"say columns={{'instruction': {column!r}}} (on a command line columns.instruction={column}): that is the "
        "user's turn then, and the answers are the assistant's"
    )


def _is_written(pair: TextPair | ChatPair, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a string holds special tokens, as one that a chat template has written."""
    text = f"{pair.prompt}{pair.chosen}"
    return any(len(token) >= _SHORTEST and token in text for token in tokenizer.all_special_tokens)
