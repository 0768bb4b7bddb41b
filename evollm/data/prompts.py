"""The context of a row, everything before its completions: system text, earlier turns, prompt and further input."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from evollm.data.cells import (
    PROMPT_ROLES,
    TEMPLATE_COLUMNS,
    Message,
    Row,
    UnusableRowError,
    cell,
    history,
    is_learnt_in_part,
    is_missing,
    optional_text,
    template_arguments,
)
from evollm.data.rows import MIXED_KINDS, REMARK, SPOKEN, UnusedColumnError

TWO_SYSTEMS = "two system texts that differ"
OTHERS_IN_COMPLETION = "turns in a completion that are not the assistant's, or not to be learnt, and are not scored"
ENDS_WITH_ANSWER = "the conversation ends with an answer that is not the chosen one"


@dataclass(frozen=True)
class Context:
    """The context of a row's completions.

    Attributes:
        prompt: Text or messages; None for a row without a prompt, whose sides may begin with it.
        before: Messages before the prompt: system text and earlier turns.
        spoken: Whether strings of the row are turns of a conversation, and not plain text.
    """

    prompt: list[Message] | str | None
    before: list[Message]
    spoken: bool

    def messages(self) -> list[Message]:
        """The context as messages; a prompt that is text becomes the user's."""
        if isinstance(self.prompt, list):
            return with_system(self.before, self.prompt)
        said = [{"role": "user", "content": self.prompt}] if self.prompt else []
        return [*self.before, *said]

    def text(self, completions: Sequence[str]) -> str:
        """The context as text that ends so that each completion can follow: one line for each turn."""
        text = "\n".join(message["content"] for message in self.messages())
        return text if any(side[:1].isspace() for side in completions) or not text else f"{text}\n"


def context_of(row: Row) -> Context:
    """Read the context of a row.

    Raises:
        UnusableRowError: A cell is neither text nor messages, or further input stands beside a prompt of messages.
    """
    prompt = cell(row, "prompt") if "prompt" in row else None
    more = optional_text(row, "input")
    if more and not isinstance(prompt, str):
        raise UnusableRowError(MIXED_KINDS)
    if more and isinstance(prompt, str):
        prompt = f"{prompt}\n{more}" if prompt else more
    system = optional_text(row, "system")
    before = with_system([{"role": "system", "content": system}] if system else [], history(row))
    return Context(prompt, before, SPOKEN in row)


def with_system(before: list[Message], messages: list[Message]) -> list[Message]:
    """`before` followed by `messages`; a system message that both begin with is kept once.

    Raises:
        UnusableRowError: Both begin with a system message, and the two differ.
    """
    if not before or not messages or messages[0]["role"] != "system":
        return [*before, *messages]
    if before[0]["role"] == "system" and before[0]["content"] != messages[0]["content"]:
        raise UnusableRowError(TWO_SYSTEMS)
    rest = before[1:] if before[0]["role"] == "system" else before
    return [messages[0], *rest, *messages[1:]]


def with_conversation(row: Row, context: Context, chosen: list[Message] | str) -> Context:
    """The context of a row that has a column with a conversation beside its sides.

    The conversation is the prompt if the row has no other. It may end with the chosen side, as in UltraFeedback.

    Raises:
        UnusableRowError: The cell is no list of messages, or ends with an answer that is not the chosen one.
        UnusedColumnError: The row has a prompt, and the conversation differs from prompt and sides.
    """
    if is_missing(row.get("conversation")):
        return context
    talk = cell(row, "conversation")
    if not talk:
        return context
    if not isinstance(talk, list):
        raise UnusableRowError(MIXED_KINDS)
    sides = [{"role": "assistant", "content": chosen}] if isinstance(chosen, str) else chosen
    whole = bool(sides) and sides[0]["role"] in PROMPT_ROLES
    if context.prompt is not None or whole:
        said = sides if whole else [*context.messages(), *sides]
        if not _is_repeated(talk, said):
            raise UnusedColumnError("conversation", "says something else than prompt and sides and would not be used")
        return context
    if talk[-1]["role"] not in PROMPT_ROLES and sides and talk[len(talk) - len(sides) :] == sides:
        talk = talk[: len(talk) - len(sides)]
    if not talk or talk[-1]["role"] not in PROMPT_ROLES:
        raise UnusableRowError(ENDS_WITH_ANSWER)
    return Context(talk, context.before, context.spoken)


def _is_repeated(messages: Sequence[Message], said: Sequence[Message]) -> bool:
    """Whether the texts of `messages` are among those of `said`, in the same order, whitespace aside."""
    rest = iter([" ".join(str(message.get("content", "")).split()) for message in said])
    return all(" ".join(str(message.get("content", "")).split()) in rest for message in messages)


def require_repeated(text: str, messages: Sequence[Message], role: str) -> None:
    """Check that a prompt which is text is repeated in the messages, since it is not used itself.

    Raises:
        UnusedColumnError: No message contains the text.
    """
    plain = " ".join(text.split())
    if not any(plain in " ".join(str(message.get("content", "")).split()) for message in messages):
        raise UnusedColumnError(role, "is not what the messages say and would not be used")


def require_no_template(row: Row) -> None:
    """Check that a row of plain text has no arguments for a chat template.

    Raises:
        UnusableRowError: A cell of these columns is malformed.
        UnusedColumnError: A cell of these columns is filled.
    """
    found = template_arguments(row)
    for role, value in zip(TEMPLATE_COLUMNS, found.values(), strict=True):
        if value:
            raise UnusedColumnError(role, "is for a chat template, and would not be used with a prompt that is text")


def remarks_of(row: Row, *completions: Sequence[Message]) -> tuple[str, ...]:
    """Remarks on a row that is used, for the report."""
    found = [row[REMARK]] if REMARK in row else []
    if any(map(is_learnt_in_part, completions)):
        found.append(OTHERS_IN_COMPLETION)
    with suppress(KeyError, TypeError, ValueError):  # Scores may be missing, or no numbers.
        if float(row["score_chosen"]) < float(row["score_rejected"]):
            found.append("a score of the chosen side below that of the rejected one")
    return tuple(found)
