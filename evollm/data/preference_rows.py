"""Rows with two completions of one prompt, as text or as chat messages: preference pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from evollm.data.cells import (
    PROMPT_ROLES,
    Message,
    Row,
    UnusableRowError,
    cell,
    require_text,
    template_arguments,
)
from evollm.data.pairs import ChatPair, TextPair
from evollm.data.prompts import (
    Context,
    context_of,
    remarks_of,
    require_no_template,
    require_repeated,
    with_conversation,
    with_system,
)
from evollm.data.rows import MIXED_KINDS, NO_PROMPT_MESSAGE, DroppedRows, RowFormat, read_dataset
from evollm.data.shapes import PAIR

REQUIRED_COLUMNS = ("chosen", "rejected")
ASSISTANT_MARKER = "\n\nAssistant:"

SAME_COMPLETIONS = "chosen == rejected"
DIFFERENT_PROMPTS = "the two sides have different prompts"


def read_pairs(dataset: object, field: str) -> tuple[list[TextPair | ChatPair], DroppedRows]:
    """Read the preference pairs of a dataset.

    Args:
        dataset: What [`evollm.data.rows.read_dataset`][] takes. The columns `chosen` and `rejected` hold strings or
            lists of `{"role", "content"}` messages; so does `prompt`, which is optional. Of messages `tools`, functions
            or JSON schemas, and `chat_template_kwargs`, a mapping, go to the chat template. `evollm.data.shapes` lists
            the other formats.
        field: The user's name for the dataset, for messages.

    Returns:
        The pairs in the dataset's order, and for each reason the positions of the dropped rows.

    Raises:
        DataError: The dataset cannot be read, lacks a column or has no row.
    """
    return read_dataset(dataset, field, PAIRS)


def shared_length(*sequences: Sequence[Any]) -> int:
    """Length of the longest common prefix of sequences of one type, such as texts or lists of token ids."""
    first, *others = sequences
    shared, end = 0, min(map(len, sequences))
    # A binary search: slices are compared in C, items would be compared in Python.
    while shared < end:
        middle = (shared + end + 1) // 2
        if all(other[shared:middle] == first[shared:middle] for other in others):
            shared = middle
        else:
            end = middle - 1
    return shared


def _to_pair(number: int, row: Row) -> TextPair | ChatPair:
    chosen, rejected = (cell(row, name) for name in REQUIRED_COLUMNS)
    if isinstance(chosen, str) is not isinstance(rejected, str):
        raise UnusableRowError(MIXED_KINDS)
    context = with_conversation(row, context_of(row), chosen)
    if isinstance(chosen, str) and isinstance(rejected, str):
        if not isinstance(context.prompt, list) and not context.spoken:
            require_no_template(row)
            return replace(_text_pair(number, context.prompt, chosen, rejected), remarks=remarks_of(row))
        pair = _chat_pair_of_strings(number, context, chosen, rejected)
    else:
        pair = _chat_pair(number, context, cast("list[Message]", chosen), cast("list[Message]", rejected))
    arguments = template_arguments(row)
    plain = None if any(arguments.values()) else pair.plain
    return replace(pair, **arguments, remarks=remarks_of(row, *pair.completions), plain=plain)


def _chat_pair_of_strings(number: int, context: Context, chosen: str, rejected: str) -> ChatPair:
    """A pair of strings that are answers in a conversation."""
    _require_two_completions(chosen, rejected)
    prompt = context.messages()
    if not any(message["role"] == "user" for message in prompt):
        raise UnusableRowError(NO_PROMPT_MESSAGE)
    if prompt[-1]["role"] not in PROMPT_ROLES:
        raise UnusableRowError(MIXED_KINDS)
    first, second = ([{"role": "assistant", "content": side}] for side in (chosen, rejected))
    text = context.text((chosen, rejected)) if isinstance(context.prompt, str) else None
    plain = None if text is None else TextPair(number, text, chosen, rejected)
    return ChatPair(number, prompt, first, second, plain=plain)


# ------------------------------------------------------------------------------------------------------------- strings


def _text_pair(row: int, prompt: str | None, chosen: str, rejected: str) -> TextPair:
    _require_two_completions(chosen, rejected)
    if prompt is None:
        prompt = _implicit_prompt(chosen, rejected)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        _require_two_completions(chosen, rejected)
    return TextPair(row, prompt, chosen, rejected)


def _require_two_completions(chosen: Sequence[Message] | str, rejected: Sequence[Message] | str) -> None:
    if chosen == rejected:
        raise UnusableRowError(SAME_COMPLETIONS)
    require_text(chosen, rejected)


def _implicit_prompt(chosen: str, rejected: str) -> str:
    if ASSISTANT_MARKER not in chosen and ASSISTANT_MARKER not in rejected:
        return chosen[: _boundary(chosen, rejected)]
    prompt, other = ("".join(text.rpartition(ASSISTANT_MARKER)[:2]) for text in (chosen, rejected))
    if prompt != other:
        raise UnusableRowError(DIFFERENT_PROMPTS)
    return prompt


def _boundary(chosen: str, rejected: str) -> int:
    """Length of the texts' common prefix, shortened so that it ends between words and leaves both a completion."""
    end = shared_length(chosen, rejected)
    if end == min(len(chosen), len(rejected)):
        end = len(chosen[:end].rstrip())  # One text continues the other: both keep the last word.
        while end and not chosen[end - 1].isspace():
            end -= 1
    elif _is_word(chosen[end]) or _is_word(rejected[end]):
        while end and _is_word(chosen[end - 1]):
            end -= 1
    return end - 1 if chosen[:end].endswith(" ") else end


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


# ------------------------------------------------------------------------------------------------------------ messages


def _chat_pair(row: int, context: Context, chosen: list[Message], rejected: list[Message]) -> ChatPair:
    prompt = context.prompt
    explicit: list[Message] = []
    has_messages = isinstance(prompt, list) and bool(prompt)
    if not has_messages and all(side and side[0]["role"] in PROMPT_ROLES for side in (chosen, rejected)):
        # Each side is a whole conversation, prompt included.
        chosen, rejected = (with_system(context.before, side) for side in (chosen, rejected))
    else:
        explicit = context.messages()
        repeated = prompt if isinstance(prompt, list) else []
        chosen, rejected = (_without_prefix(_without_prefix(side, explicit), repeated) for side in (chosen, rejected))
    _require_two_completions(chosen, rejected)
    shared = _shared_messages(chosen, rejected, until_assistant=bool(explicit))
    full_prompt = [*explicit, *chosen[:shared]]
    chosen, rejected = chosen[shared:], rejected[shared:]
    if any(side[0]["role"] in PROMPT_ROLES for side in (chosen, rejected)):
        raise UnusableRowError(DIFFERENT_PROMPTS)
    _require_two_completions(chosen, rejected)
    if isinstance(prompt, str):
        require_repeated(prompt, full_prompt, "prompt")
    if not full_prompt:
        raise UnusableRowError(NO_PROMPT_MESSAGE)
    return ChatPair(row, full_prompt, chosen, rejected)


def _without_prefix(messages: list[Message], prefix: list[Message]) -> list[Message]:
    return messages[len(prefix) :] if messages[: len(prefix)] == prefix else messages


def _shared_messages(chosen: list[Message], rejected: list[Message], until_assistant: bool) -> int:
    """Number of messages that both sides begin with and that belong to the prompt; each side keeps at least one.

    With `until_assistant` the prompt ends at the assistant's first message, since the row has given one already.
    """
    shared = min(shared_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    if not until_assistant:
        return shared
    answers = (number for number, message in enumerate(chosen[:shared]) if message["role"] not in PROMPT_ROLES)
    return next(answers, shared)


PAIRS = RowFormat("pair", PAIR, _to_pair)
