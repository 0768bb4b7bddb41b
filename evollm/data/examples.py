"""Rows of examples for supervised fine-tuning: one completion of a prompt, as text or as chat messages."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace

import numpy as np

from evollm.data.cells import (
    GIVEN_ROLES,
    TEMPLATE_COLUMNS,
    Message,
    Row,
    UnusableRowError,
    cell,
    require_text,
    template_arguments,
)
from evollm.data.columns import PROMPT_ALIASES, missing_hint
from evollm.data.rows import MIXED_KINDS, NO_PROMPT_MESSAGE, ChatPair, DroppedRows, RowFormat, TextPair, read_dataset

NO_ANSWER = "no assistant message"
NOT_AN_ANSWER = "the completion is not the assistant's"
NOT_PREFERRED = "labelled as not preferred"
_NAMES = "prompt and completion, or messages, or text"
# Two names for whole conversations.
_CONVERSATIONS = ("messages", "conversations")


def read_examples(dataset: object, field: str) -> tuple[list[TextPair | ChatPair], DroppedRows]:
    """Read a dataset's examples, which are pairs without a rejected side, and set apart the rows that are not usable.

    Args:
        dataset: What [`evollm.data.rows.read_dataset`][] takes. Its columns are `prompt` and `completion`, both strings
            or both lists of `{"role", "content"}` messages, or `messages`, a conversation whose last assistant message
            is the completion; what follows that message is not used. ShareGPT's `conversations` of `{"from", "value"}`
            are read like `messages`, and `text` is learnt from its first token on. `tools` and `chat_template_kwargs`
            go to the chat template. Rows whose `label` is False are not used.
        field: What the user calls the dataset, for messages.

    Returns:
        The examples in the dataset's order, and for each reason the positions of the rows that were dropped.

    Raises:
        DataError: The dataset cannot be read, lacks a column or has no row.
    """
    return read_dataset(dataset, field, EXAMPLES)


def _fault(columns: Sequence[str]) -> str:
    has_messages, has_completion = any(name in columns for name in _CONVERSATIONS), "completion" in columns
    if has_messages and has_completion:
        return "has both messages and completion; leave one of them out"
    if has_messages or (has_completion and "prompt" in columns):
        return ""
    if "chosen" in columns:
        return (
            "holds preference pairs; pass them to PreferenceGym, or rename chosen to completion to learn from it alone"
        )
    if has_completion and any(name in columns for name in PROMPT_ALIASES):
        return ""  # for which there is a better message
    if "text" in columns and not has_completion:
        return ""
    missing = ["prompt"] if has_completion else ["completion"]
    hint = missing_hint(missing if "prompt" in columns or has_completion else ["messages"], columns, EXAMPLES.columns)
    return f"lacks {missing[0]}{hint}; rename its columns to {_NAMES}"


def _to_example(number: int, row: Row, columns: AbstractSet[str]) -> TextPair | ChatPair:
    if _is_false(row.get("label")):  # unpaired preferences: one of two kinds of completions
        raise UnusableRowError(NOT_PREFERRED)
    for name in _CONVERSATIONS:
        if name in columns:
            return replace(_conversation(number, cell(row, name)), **template_arguments(row))
    if "completion" not in columns:
        return _whole_text(number, cell(row, "text"))
    prompt, completion = cell(row, "prompt"), cell(row, "completion")
    require_text(completion)
    if isinstance(prompt, str) and isinstance(completion, str):
        return TextPair(number, prompt, completion)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise UnusableRowError(MIXED_KINDS)
    return replace(_chat_example(number, prompt, completion), **template_arguments(row))


def _is_false(label: object) -> bool:
    return label.lower() == "false" if isinstance(label, str) else isinstance(label, bool | np.bool_) and not label


def _whole_text(number: int, text: str | list[Message]) -> TextPair:
    """Text to learn from its first token on, as a language model does: it answers nothing."""
    if not isinstance(text, str):
        raise UnusableRowError("text is a list; rename the column to messages")
    require_text(text)
    return TextPair(number, "", text)


def _conversation(number: int, messages: str | list[Message]) -> ChatPair:
    if isinstance(messages, str):
        raise UnusableRowError("messages is text, not a list of messages")
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise UnusableRowError(NO_ANSWER)
    require_text([messages[answers[-1]]])
    return _chat_example(number, messages[: answers[-1]], [messages[answers[-1]]])


def _chat_example(number: int, prompt: list[Message], completion: list[Message]) -> ChatPair:
    if not prompt:
        raise UnusableRowError(NO_PROMPT_MESSAGE)
    if completion[0]["role"] in GIVEN_ROLES:
        raise UnusableRowError(NOT_AN_ANSWER)
    return ChatPair(number, prompt, completion)


EXAMPLES = RowFormat(
    "example",
    ("prompt", "completion", *_CONVERSATIONS, "text", "label", *TEMPLATE_COLUMNS),
    _fault,
    _to_example,
)
