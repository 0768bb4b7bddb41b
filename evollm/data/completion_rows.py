"""Rows with one completion of a prompt, as text or as chat messages: the examples of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import replace

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
from evollm.data.prompts import Context, context_of, remarks_of, require_no_template, require_repeated, with_system
from evollm.data.rows import LABELLED, MIXED_KINDS, NO_PROMPT_MESSAGE, DroppedRows, RowFormat, read_dataset
from evollm.data.shapes import EXAMPLE

NO_ANSWER = "no assistant message"
NOT_AN_ANSWER = "the completion is not the assistant's"
NOT_PREFERRED = "labelled as not preferred"
UNKNOWN_LABEL = "label is neither true, false, 1 nor 0, nor what columns.label says"


def read_examples(dataset: object, field: str) -> tuple[list[TextPair | ChatPair], DroppedRows]:
    """Read the examples of a dataset: pairs without a rejected side.

    Args:
        dataset: What [`evollm.data.rows.read_dataset`][] takes. Its columns are `prompt` and `completion`, both strings
            or both lists of `{"role", "content"}` messages, or `messages`, a conversation whose last assistant message
            is the completion; later messages are not used. ShareGPT's `conversations` of `{"from", "value"}` are read
            like `messages`. The loss of `text` is over all its tokens but the first. `tools` and
            `chat_template_kwargs` go to the chat template. Rows whose `label` is False or 0 are not used.
            `evollm.data.shapes` lists the other formats.
        field: The user's name for the dataset, for messages.

    Returns:
        The examples in the dataset's order, and for each reason the positions of the dropped rows.

    Raises:
        DataError: The dataset cannot be read, lacks a column or has no row.
    """
    return read_dataset(dataset, field, EXAMPLES)


def _to_example(number: int, row: Row) -> TextPair | ChatPair:
    if LABELLED in row and not row["label"]:  # unpaired preferences, of which the good completions are learnt
        raise UnusableRowError(UNKNOWN_LABEL if row["label"] is None else NOT_PREFERRED)
    if "messages" in row:
        example = _conversation(number, cell(row, "messages"), context_of(row))
        if isinstance(row.get("repeated"), str):
            require_repeated(row["repeated"], [*example.prompt, *example.chosen], "repeated")
        return replace(example, **template_arguments(row), remarks=remarks_of(row, example.chosen))
    if "completion" not in row:
        return _whole_text(number, cell(row, "text"))
    context, completion = context_of(row), cell(row, "completion")
    require_text(completion)
    if isinstance(context.prompt, str) and isinstance(completion, str) and not context.spoken:
        require_no_template(row)
        return TextPair(number, context.prompt, completion, remarks=remarks_of(row))
    prompt = context.messages()
    if isinstance(completion, str):
        if not prompt or prompt[-1]["role"] not in PROMPT_ROLES:
            raise UnusableRowError(MIXED_KINDS)
        example = _chat_example(number, prompt, [{"role": "assistant", "content": completion}])
        if isinstance(context.prompt, str):
            example = replace(example, plain=TextPair(number, context.text([completion]), completion))
    else:
        example = _chat_example(number, prompt, completion)
    arguments = template_arguments(row)
    plain = None if any(arguments.values()) else example.plain
    return replace(example, **arguments, remarks=remarks_of(row, example.chosen), plain=plain)


def _whole_text(number: int, text: str | list[Message]) -> TextPair:
    """A text without a prompt, learnt as in pretraining."""
    if not isinstance(text, str):
        raise UnusableRowError("text is a list; rename the column to messages")
    require_text(text)
    return TextPair(number, "", text)


def _conversation(number: int, messages: str | list[Message], context: Context) -> ChatPair:
    if isinstance(messages, str):
        raise UnusableRowError("messages is text, not a list of messages")
    messages = with_system(context.before, messages)
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise UnusableRowError(NO_ANSWER)
    require_text([messages[answers[-1]]])
    return _chat_example(number, messages[: answers[-1]], [messages[answers[-1]]])


def _chat_example(number: int, prompt: list[Message], completion: list[Message]) -> ChatPair:
    if not prompt:
        raise UnusableRowError(NO_PROMPT_MESSAGE)
    if completion[0]["role"] in PROMPT_ROLES:
        raise UnusableRowError(NOT_AN_ANSWER)
    return ChatPair(number, prompt, completion)


EXAMPLES = RowFormat("example", EXAMPLE, _to_example)
