"""A search for texts of a row that its chat template leaves out: each text is looked for in the rendered conversation.

Templates trim, wrap and escape, so texts are compared without whitespace, both plain and as JSON. Messages are searched
in their order, each behind the one before, as templates keep the order; system messages may stand anywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from evollm.data.cells import Message, UnusableRowError
from evollm.data.chat_template import RenderedChat
from evollm.data.pairs import ChatPair

# Keys of a message that hold the reasoning before an answer.
REASONING = ("reasoning_content", "reasoning", "thinking")
_END_OF_THOUGHT = "</think>"
# Roles that templates handle even where their source does not name them.
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
# Roles whose messages templates may move: to the beginning, or into a user's turn.
_MOVABLE = frozenset({"system", "developer"})

LEFT_OUT = "which the chat template leaves out"
ALIKE = "sides that the chat template writes alike"
NOTHING_LEFT = "completion of which the chat template writes nothing"
QUESTION_SCORED = "whose last prompt message is scored, as the chat template writes it otherwise before an answer"


@dataclass(frozen=True)
class _Found:
    """The result of a search for messages; places are characters of the rendered text without whitespace.

    Attributes:
        lost: The parts of messages that were not found.
        end: End of the last message that was found, system messages apart.
        last_end: End of the last message's content; None if it was not found.
        is_any_there: Whether at least one part of the messages was found.
    """

    lost: tuple[str, ...]
    end: int
    last_end: int | None
    is_any_there: bool


def check_rendered(pair: ChatPair, chat: RenderedChat, template: str) -> list[str]:
    """Remarks on what the chat template loses or moves of a row, each as the end of "3 rows ...".

    Args:
        pair: The row.
        chat: The row as the template renders it.
        template: The template's source.

    Raises:
        UnusableRowError: The sides are rendered alike, or nothing of a completion is rendered.
    """
    shared = chat.given
    beginning = _without_space(shared)
    wholes = [beginning + _without_space(whole[len(shared) :]) for whole in chat.wholes]
    lost: dict[str, None] = {}
    lost_of_completions: dict[str, None] = {}
    is_scored = is_empty = False
    in_beginning = _search(pair.prompt, beginning, 0, "an earlier {role} message")
    for side, whole in zip(pair.completions, wholes, strict=True):
        given = in_beginning
        if given.lost:  # The prompt may end behind the shared beginning: search the whole conversation.
            given = _search(pair.prompt, whole, 0, "an earlier {role} message")
        answer = _search(side, whole, given.end, "the completion")
        lost.update(dict.fromkeys(given.lost))
        lost_of_completions.update(dict.fromkeys(answer.lost))
        is_scored |= given.last_end is not None and given.last_end > len(beginning)
        # A template may cut a message: one word of it is enough.
        words, rest = (word for message in side for word in message.get("content", "").split()), whole[given.end :]
        is_empty |= not answer.is_any_there and not any(word in rest for word in words)
    unknown = [*_unknown_words(pair, template)]
    # Sides without a loss may differ in whitespace alone, which the pair may be about.
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
    """Look for messages behind `start`, each at its first match, which is at its true place or before."""
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


def _find_content(content: str, whole: str, start: int) -> tuple[int | None, tuple[str, ...]]:
    """The end of a message's content, None if it was not found, and the parts of it that were not."""
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
    """Names and texts of the parts of a message beside its content: reasoning, name of the speaker, tool calls."""
    for name in REASONING:
        text = message.get(name)
        if isinstance(text, str) and text.strip():
            yield name, text
    speaker = message.get("name")
    if isinstance(speaker, str) and speaker.strip() and message["role"] != "tool":
        yield "name", speaker
    # `function_call` is OpenAI's older format, of one call.
    calls = [*message.get("tool_calls", ()), *filter(None, [message.get("function_call")])]
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if isinstance(function, Mapping):
            yield from (("tool call", text) for text in _texts(function.get("name")))
            arguments = function.get("arguments")
            if isinstance(arguments, str):
                with suppress(ValueError, RecursionError):
                    arguments = json.loads(arguments)
            yield from (("tool call", text) for text in _texts(arguments))


def _texts(value: Any) -> Iterator[str]:
    """All keys and texts in a nested value; numbers are left out, since templates format them differently."""
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
    """Remarks on roles and arguments that the template's source does not contain."""
    roles = dict.fromkeys(message["role"] for side in (pair.prompt, *pair.completions) for message in side)
    for role in roles:
        if role not in _ROLES and f"'{role}'" not in template and f'"{role}"' not in template:
            yield f"with the role {role[:40]!r}, which the chat template does not name"
    for name in pair.template_kwargs:
        if not re.search(rf"\b{re.escape(name)}\b", template):
            yield f"with {name[:40]!r} in chat_template_kwargs, which the chat template does not use"


def _end_of(text: str, whole: str, start: int) -> int | None:
    """The end of the text's first occurrence behind `start`; None if there is none."""
    for form in _forms(text):
        place = whole.find(form, start)
        if place >= 0:
            return place + len(form)
    return None


def _forms(text: str) -> Iterator[str]:
    """The text as it is, as JSON, and as JSON within a JSON string, in which tool calls are written."""
    yield _without_space(text)
    for ascii_only in (False, True):
        once = json.dumps(text, ensure_ascii=ascii_only)[1:-1]
        yield _without_space(once)
        yield _without_space(json.dumps(once, ensure_ascii=False)[1:-1])


def _without_space(text: str) -> str:
    return "".join(text.split())
