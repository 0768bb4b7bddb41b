"""What a row gives before its completions: system text, earlier turns, prompt and further input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evollm.data.cells import (
    GIVEN_ROLES,
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
class Given:
    """What stands before the completions of a row.

    Attributes:
        prompt: Text or messages; None: nothing but what is before it, or the beginning of the sides.
        before: Messages that come before the prompt: system text and earlier turns.
        spoken: Whether the row says who speaks, so that its strings are turns of a conversation.
    """

    prompt: list[Message] | str | None
    before: list[Message]
    spoken: bool

    def messages(self) -> list[Message]:
        """All of it as messages; a text is the user's."""
        if isinstance(self.prompt, list):
            return with_system(self.before, self.prompt)
        said = [{"role": "user", "content": self.prompt}] if self.prompt else []
        return [*self.before, *said]

    def text(self, completions: Sequence[str]) -> str:
        """All of it as text, to be followed by any of the completions: a line for each turn."""
        text = "\n".join(message["content"] for message in self.messages())
        return text if any(side[:1].isspace() for side in completions) or not text else f"{text}\n"


def given_of(row: Row) -> Given:
    """What a row gives.

    Raises:
        UnusableRowError: It is no text and no messages, or both.
    """
    prompt = cell(row, "prompt") if "prompt" in row else None
    more = optional_text(row, "input")
    if more and not isinstance(prompt, str):
        raise UnusableRowError(MIXED_KINDS)
    if more and isinstance(prompt, str):
        prompt = f"{prompt}\n{more}" if prompt else more
    system = optional_text(row, "system")
    before = with_system([{"role": "system", "content": system}] if system else [], history(row))
    return Given(prompt, before, SPOKEN in row)


def with_system(before: list[Message], messages: list[Message]) -> list[Message]:
    """Messages behind others; a system text that both begin with is there once.

    Raises:
        UnusableRowError: They have two, and these differ.
    """
    if not before or not messages or messages[0]["role"] != "system":
        return [*before, *messages]
    if before[0]["role"] == "system" and before[0]["content"] != messages[0]["content"]:
        raise UnusableRowError(TWO_SYSTEMS)
    rest = before[1:] if before[0]["role"] == "system" else before
    return [messages[0], *rest, *messages[1:]]


def conversation_of(row: Row, given: Given, chosen: list[Message] | str) -> Given:
    """What a row gives whose conversation stands in a column beside its sides.

    The conversation is the prompt of sides that are answers. It may repeat the chosen side, as UltraFeedback does.

    Raises:
        UnusableRowError: It is no conversation, or ends with another answer.
        UnusedColumnError: It says something else than the prompt and the sides.
    """
    if is_missing(row.get("conversation")):
        return given
    talk = cell(row, "conversation")
    if not talk:
        return given
    if not isinstance(talk, list):
        raise UnusableRowError(MIXED_KINDS)
    sides = [{"role": "assistant", "content": chosen}] if isinstance(chosen, str) else chosen
    whole = bool(sides) and sides[0]["role"] in GIVEN_ROLES
    if given.prompt is not None or whole:
        said = sides if whole else [*given.messages(), *sides]
        if not _is_part(talk, said):
            raise UnusedColumnError("conversation", "says something else than prompt and sides and would not be used")
        return given
    if talk[-1]["role"] not in GIVEN_ROLES and sides and talk[len(talk) - len(sides) :] == sides:
        talk = talk[: len(talk) - len(sides)]
    if not talk or talk[-1]["role"] not in GIVEN_ROLES:
        raise UnusableRowError(ENDS_WITH_ANSWER)
    return Given(talk, given.before, given.spoken)


def _is_part(messages: Sequence[Message], said: Sequence[Message]) -> bool:
    """Whether all that messages say is said, in that order."""
    rest = iter([" ".join(str(message.get("content", "")).split()) for message in said])
    return all(" ".join(str(message.get("content", "")).split()) in rest for message in messages)


def require_said(text: str, messages: Sequence[Message], role: str) -> None:
    """Refuse a prompt beside messages that do not have it.

    Raises:
        UnusedColumnError: They do not.
    """
    plain = " ".join(text.split())
    if not any(plain in " ".join(str(message.get("content", "")).split()) for message in messages):
        raise UnusedColumnError(role, "is not what the messages say and would not be used")


def require_no_template(row: Row) -> None:
    """Refuse what is for a chat template beside strings that go through none.

    Raises:
        UnusableRowError: It is something else than a template takes.
        UnusedColumnError: There is something.
    """
    found = template_arguments(row)
    for role, given in zip(TEMPLATE_COLUMNS, found.values(), strict=True):
        if given:
            raise UnusedColumnError(role, "is for a chat template, and would not be used with a prompt that is text")


def remarks_of(row: Row, *completions: Sequence[Message]) -> tuple[str, ...]:
    """What is strange about a row."""
    found = [row[REMARK]] if REMARK in row else []
    if any(map(is_learnt_in_part, completions)):
        found.append(OTHERS_IN_COMPLETION)
    low, high = _number(row.get("score_chosen")), _number(row.get("score_rejected"))
    if low is not None and high is not None and low < high:
        found.append("a score of the chosen side below that of the rejected one")
    return tuple(found)


def _number(value: object) -> float | None:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
