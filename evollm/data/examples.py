"""Rows of examples for supervised fine-tuning: one completion of a prompt, as text or as chat messages."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from evollm.data.rows import (
    GIVEN_ROLES,
    MIXED_KINDS,
    NO_PROMPT_MESSAGE,
    PROMPT_ALIASES,
    ChatPair,
    DroppedRows,
    Message,
    Row,
    RowFormat,
    TextPair,
    UnusableRowError,
    cell,
    read_dataset,
    require_text,
)

NO_ANSWER = "no assistant message"
NOT_AN_ANSWER = "the completion is not the assistant's"
_NAMES = "prompt and completion, or messages"


def read_examples(dataset: object, field: str) -> tuple[list[TextPair | ChatPair], DroppedRows]:
    """Read a dataset's examples, which are pairs without a rejected side, and set apart the rows that are not usable.

    Args:
        dataset: What [`evollm.data.rows.read_dataset`][] takes. Its columns are `prompt` and `completion`, both strings
            or both lists of `{"role", "content"}` messages, or `messages`, a conversation whose last assistant message
            is the completion; what follows that message is not used.
        field: What the user calls the dataset, for messages.

    Returns:
        The examples in the dataset's order, and for each reason the positions of the rows that were dropped.

    Raises:
        DataError: The dataset cannot be read, lacks a column or has no row.
    """
    return read_dataset(dataset, field, EXAMPLES)


def _fault(columns: Sequence[str]) -> str:
    has_messages, has_completion = "messages" in columns, "completion" in columns
    if has_messages and has_completion:
        return "has both messages and completion; leave one of them out"
    if has_messages or (has_completion and "prompt" in columns):
        return ""
    if "chosen" in columns:
        return (
            "holds preference pairs; pass them to PreferenceGym, or rename chosen to completion to learn from it alone"
        )
    alias = next((name for name in PROMPT_ALIASES if name in columns), None)
    if has_completion and alias is not None:
        return f"has a column {alias!r} that would not be used; rename it to prompt"
    return f"lacks {'prompt' if has_completion else 'completion'}; rename its columns to {_NAMES}"


def _to_example(number: int, row: Row, columns: AbstractSet[str]) -> TextPair | ChatPair:
    if "messages" in columns:
        return _conversation(number, cell(row, "messages"))
    prompt, completion = cell(row, "prompt"), cell(row, "completion")
    require_text(completion)
    if isinstance(prompt, str) and isinstance(completion, str):
        return TextPair(number, prompt, completion)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise UnusableRowError(MIXED_KINDS)
    return _chat_example(number, prompt, completion)


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


EXAMPLES = RowFormat("example", ("prompt", "completion", "messages"), _fault, _to_example)
