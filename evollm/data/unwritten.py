"""What a chat template leaves out of a row, or moves: each text of its messages is looked for in what is written.

Templates trim, wrap and escape, so texts are compared without whitespace, as they are or as JSON writes them. Messages
are looked for one behind the other, as templates keep their order; system texts may stand anywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evollm.data.cells import Message, UnusableRowError
from evollm.data.chat_template import RenderedChat
from evollm.data.rows import ChatPair

# Names of what a model thinks before it answers.
REASONING = ("reasoning_content", "reasoning", "thinking")
_END_OF_THOUGHT = "</think>"
# Roles that most templates know; of others a template that knows them speaks.
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
# Templates write such texts at the beginning, or in a user's turn.
_MOVABLE = frozenset({"system", "developer"})

LEFT_OUT = "which the chat template leaves out"
ALIKE = "sides that the chat template writes alike"
NOTHING_LEFT = "completion of which the chat template writes nothing"
QUESTION_SCORED = "whose last prompt message is scored, as the chat template writes it otherwise before an answer"


@dataclass(frozen=True)
class _Found:
    """What a search has found.

    Attributes:
        lost: What is not written.
        end: Where the last of the texts that keep their order ends.
        last_end: Where the content of the last message ends; None: it is not written.
        is_any_there: Whether anything of the messages is written.
    """

    lost: tuple[str, ...]
    end: int
    last_end: int | None
    is_any_there: bool


def remarks(pair: ChatPair, chat: RenderedChat, template: str) -> list[str]:
    """What is strange about a row that can be used, each as the end of "3 rows ...".

    Args:
        pair: The row.
        chat: What the template makes of it.
        template: The template's source.

    Raises:
        UnusableRowError: The sides differ in nothing but what is left out, or nothing of a completion is written.
    """
    shared = chat.given
    beginning = _bare(shared)
    wholes = [beginning + _bare(whole[len(shared) :]) for whole in chat.wholes]
    lost: dict[str, None] = {}
    lost_of_completions: dict[str, None] = {}
    is_scored = is_empty = False
    in_beginning = _search(pair.prompt, beginning, 0, "an earlier {role} message")
    for side, whole in zip(pair.completions, wholes, strict=True):
        given = in_beginning
        if given.lost:  # from what both conversations begin with; not yet from each of them
            given = _search(pair.prompt, whole, 0, "an earlier {role} message")
        answer = _search(side, whole, given.end, "the completion")
        lost.update(dict.fromkeys(given.lost))
        lost_of_completions.update(dict.fromkeys(answer.lost))
        is_scored |= given.last_end is not None and given.last_end > len(beginning)
        is_empty |= not answer.is_any_there and not _is_a_word_there(side, whole[given.end :])
    unknown = [*_unknown_words(pair, template)]
    # Without a loss whitespace alone may be what is preferred.
    compared = wholes if lost_of_completions else chat.wholes
    is_alike = len(compared) > 1 and compared[0] == compared[1]
    if is_alike or is_empty:
        why = "; ".join([*(f"without {part}" for part in lost_of_completions), *unknown])
        raise UnusableRowError(f"{ALIKE if is_alike else NOTHING_LEFT}{' (' if why else ''}{why}{')' if why else ''}")
    if not all(_is_tool_written(tool, wholes[0]) for tool in pair.tools or ()):
        lost["the tools, or some of them"] = None
    parts = [f"without {part}, {LEFT_OUT}" for part in (*lost, *lost_of_completions)]
    return [*parts, *([QUESTION_SCORED] if is_scored else []), *unknown]


def _search(messages: Sequence[Message], whole: str, start: int, where: str) -> _Found:
    """Look for the messages behind a place; the first match of each is never behind its true place."""
    lost: dict[str, None] = {}
    end, last_end, is_any = start, None, False
    for message in messages:
        role = message["role"]
        place = 0 if role in _MOVABLE else end
        named = where.format(role=role)
        last_end, lost_content = _find_content(message.get("content", ""), whole, place)
        parts = {(name, text): _end_of(text, whole, place) for name, text in _further_parts(message)}
        missing = dict.fromkeys(name for (name, _), found in parts.items() if found is None)
        is_any |= (last_end or place) > place or any(found is not None for found in parts.values())
        lost.update({f"the {name} of {named}": None for name in (*lost_content, *missing)})
        if last_end is not None and role not in _MOVABLE:
            end = last_end
    return _Found(tuple(lost), end, last_end, is_any)


def _is_a_word_there(messages: Sequence[Message], whole: str) -> bool:
    """Whether a word of the messages is written, though no message is to its end."""
    return any(word in whole for message in messages for word in message.get("content", "").split())


def _find_content(content: str, whole: str, start: int) -> tuple[int | None, tuple[str, ...]]:
    """Where a message's content ends, None if it is not there, and what of it is lost."""
    end = _end_of(content, whole, start)
    if end is not None:
        return end, ()
    thought, mark, answer = content.rpartition(_END_OF_THOUGHT)
    end = _end_of(answer, whole, start) if mark and answer.strip() else None
    if end is None:
        return None, ("content",)
    thought = thought.replace("<think>", "")
    return end, ("reasoning",) if _end_of(thought, whole, start) is None else ()


def _further_parts(message: Message) -> Iterator[tuple[str, str]]:
    """Names and texts of what a message says beside its content."""
    for name in REASONING:
        text = message.get(name)
        if isinstance(text, str) and text.strip():
            yield name, text
    speaker = message.get("name")
    if isinstance(speaker, str) and speaker.strip() and message["role"] != "tool":
        yield "name", speaker
    # OpenAI's way before there were several calls.
    calls = [*message.get("tool_calls", ()), *filter(None, [message.get("function_call")])]
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if isinstance(function, Mapping):
            yield from (("tool call", text) for text in _texts(function.get("name")))
            yield from (("tool call", text) for text in _texts(_unpacked(function.get("arguments"))))


def _unpacked(arguments: Any) -> Any:
    """Arguments that are JSON text, as they are otherwise."""
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments


def _texts(value: Any) -> Iterator[str]:
    """All names and texts in a nested value; how a number is written is the template's affair."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            left.extend([*map(str, value), *value.values()])
        elif isinstance(value, list | tuple):
            left.extend(value)


def _is_tool_written(tool: Any, whole: str) -> bool:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else {"name": getattr(tool, "__name__", "")}
    texts = (function.get(name) for name in ("name", "description")) if isinstance(function, Mapping) else ()
    return all(_end_of(text, whole, 0) is not None for text in texts if isinstance(text, str))


def _unknown_words(pair: ChatPair, template: str) -> Iterator[str]:
    roles = dict.fromkeys(message["role"] for side in (pair.prompt, *pair.completions) for message in side)
    for role in roles:
        if role not in _ROLES and f"'{role}'" not in template and f'"{role}"' not in template:
            yield f"with the role {role[:40]!r}, which the chat template does not name"
    for name in pair.template_kwargs:
        if not re.search(rf"\b{re.escape(name)}\b", template):
            yield f"with {name[:40]!r} in chat_template_kwargs, which the chat template does not use"


def _end_of(text: str, whole: str, start: int) -> int | None:
    """Where a text ends that is written behind a place."""
    for form in _forms(text):
        place = whole.find(form, start)
        if place >= 0:
            return place + len(form)
    return None


def _forms(text: str) -> Iterator[str]:
    """The text as it is, as JSON, and as JSON in a JSON string, as tool calls are."""
    yield _bare(text)
    for ascii_only in (False, True):
        once = json.dumps(text, ensure_ascii=ascii_only)[1:-1]
        yield _bare(once)
        yield _bare(json.dumps(once, ensure_ascii=False)[1:-1])


def _bare(text: str) -> str:
    return "".join(text.split())
