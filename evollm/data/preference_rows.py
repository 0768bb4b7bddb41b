"""Rows of preference pairs: two completions of one prompt, as text or as chat messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from evollm.data.cells import (
    GIVEN_ROLES,
    Message,
    Row,
    UnusableRowError,
    cell,
    require_text,
    template_arguments,
)
from evollm.data.prompts import (
    Given,
    conversation_of,
    given_of,
    remarks_of,
    require_no_template,
    require_said,
    with_system,
)
from evollm.data.rows import MIXED_KINDS, NO_PROMPT_MESSAGE, ChatPair, DroppedRows, RowFormat, TextPair, read_dataset
from evollm.data.shapes import PAIR

REQUIRED_COLUMNS = ("chosen", "rejected")
ASSISTANT_MARKER = "\n\nAssistant:"

SAME_COMPLETIONS = "chosen == rejected"
DIFFERENT_PROMPTS = "the two sides have different prompts"


def read_pairs(dataset: object, field: str) -> tuple[list[TextPair | ChatPair], DroppedRows]:
    """Read a dataset's preference pairs and set apart the rows that are not usable.

    Args:
        dataset: What [`evollm.data.rows.read_dataset`][] takes. The columns `chosen` and `rejected` hold strings or
            lists of `{"role", "content"}` messages; so does `prompt`, which is optional. Of messages `tools`, functions
            or JSON schemas, and `chat_template_kwargs`, a mapping, go to the chat template. `evollm.data.shapes` has
            the other shapes that are read.
        field: What the user calls the dataset, for messages.

    Returns:
        The pairs in the dataset's order, and for each reason the positions of the rows that were dropped.

    Raises:
        DataError: The dataset cannot be read, lacks a column or has no row.
    """
    return read_dataset(dataset, field, PAIRS)


def shared_length(*sequences: Sequence[Any]) -> int:
    """Length of the longest prefix that all the sequences, of one kind, have in common."""
    first, *others = sequences
    shared, end = 0, min(map(len, sequences))
    # Slices are compared without a step of Python for each item.
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
    given = conversation_of(row, given_of(row), chosen)
    if isinstance(chosen, str) and isinstance(rejected, str):
        if not isinstance(given.prompt, list) and not given.spoken:
            require_no_template(row)
            return replace(_text_pair(number, given.prompt, chosen, rejected), remarks=remarks_of(row))
        pair = _answered(number, given, chosen, rejected)
    else:
        pair = _chat_pair(number, given, cast("list[Message]", chosen), cast("list[Message]", rejected))
    arguments = template_arguments(row)
    plain = None if any(arguments.values()) else pair.plain
    return replace(pair, **arguments, remarks=remarks_of(row, *pair.completions), plain=plain)


def _answered(number: int, given: Given, chosen: str, rejected: str) -> ChatPair:
    """Strings that answer a conversation."""
    _require_two_completions(chosen, rejected)
    prompt = given.messages()
    if not any(message["role"] == "user" for message in prompt):
        raise UnusableRowError(NO_PROMPT_MESSAGE)
    if prompt[-1]["role"] not in GIVEN_ROLES:
        raise UnusableRowError(MIXED_KINDS)
    first, second = ([{"role": "assistant", "content": side}] for side in (chosen, rejected))
    text = given.text((chosen, rejected)) if isinstance(given.prompt, str) else None
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
    """Where the common prefix of two texts ends, without cutting a word or leaving nothing to complete."""
    end = shared_length(chosen, rejected)
    if end == min(len(chosen), len(rejected)):
        end = len(chosen[:end].rstrip())  # one text continues the other: give its last word back to both
        while end and not chosen[end - 1].isspace():
            end -= 1
    elif _is_word(chosen[end]) or _is_word(rejected[end]):
        while end and _is_word(chosen[end - 1]):
            end -= 1
    return end - 1 if chosen[:end].endswith(" ") else end


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


# ------------------------------------------------------------------------------------------------------------ messages


def _chat_pair(row: int, given: Given, chosen: list[Message], rejected: list[Message]) -> ChatPair:
    prompt = given.prompt
    explicit: list[Message] = []
    if (prompt is None or isinstance(prompt, str) or not prompt) and _is_whole(chosen) and _is_whole(rejected):
        chosen, rejected = (with_system(given.before, side) for side in (chosen, rejected))
    else:
        explicit = given.messages()
        repeated = prompt if isinstance(prompt, list) else []
        chosen, rejected = (_without_prefix(_without_prefix(side, explicit), repeated) for side in (chosen, rejected))
    _require_two_completions(chosen, rejected)
    shared = _shared_messages(chosen, rejected, only_given=bool(explicit))
    full_prompt = [*explicit, *chosen[:shared]]
    chosen, rejected = chosen[shared:], rejected[shared:]
    if any(side[0]["role"] in GIVEN_ROLES for side in (chosen, rejected)):
        raise UnusableRowError(DIFFERENT_PROMPTS)
    _require_two_completions(chosen, rejected)
    if isinstance(prompt, str):
        require_said(prompt, full_prompt, "prompt")
    if not full_prompt:
        raise UnusableRowError(NO_PROMPT_MESSAGE)
    return ChatPair(row, full_prompt, chosen, rejected)


def _is_whole(side: list[Message]) -> bool:
    """Whether a side is a conversation from its beginning, and not an answer alone."""
    return bool(side) and side[0]["role"] in GIVEN_ROLES


def _without_prefix(messages: list[Message], prefix: list[Message]) -> list[Message]:
    return messages[len(prefix) :] if messages[: len(prefix)] == prefix else messages


def _shared_messages(chosen: list[Message], rejected: list[Message], only_given: bool) -> int:
    """How many leading messages belong to the prompt: one at least stays on each side."""
    shared = min(shared_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    if not only_given:
        return shared
    answers = (number for number, message in enumerate(chosen[:shared]) if message["role"] not in GIVEN_ROLES)
    return next(answers, shared)


PAIRS = RowFormat("pair", PAIR, _to_pair)
