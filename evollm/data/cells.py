"""What stands in a row: text, chat messages, tools, and what a chat template is told besides."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard

import numpy as np

Message: TypeAlias = dict[str, Any]
Row: TypeAlias = dict[str, Any]

# Columns that go to the chat template beside the messages.
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
# Whatever a model is given, not what it answers: a completion cannot start with one of these.
GIVEN_ROLES = frozenset({"system", "developer", "user", "tool"})
# ShareGPT's names of the roles.
_ROLES = {"human": "user", "gpt": "assistant"}
# What evollm itself tells `apply_chat_template`, and what would make it return something else than text.
_RESERVED = frozenset(
    {
        *("conversation", "tools", "add_generation_prompt", "continue_final_message", "tokenize", "padding"),
        *("truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
        *("tokenizer_kwargs", "sanitize_control_tokens"),
    }
)

EMPTY_COMPLETION = "empty completion"
INVALID_UNICODE = "text that is not valid Unicode"
MALFORMED_MESSAGES = "malformed messages"
MALFORMED_TOOLS = "tools is not a list of functions or JSON schemas"
MALFORMED_TEMPLATE_KWARGS = "chat_template_kwargs is not a mapping of names to values"
# A template is a program: one that never ends would stop the run.
OWN_TEMPLATE = "chat_template_kwargs brings a chat template of its own: set tokenizer.chat_template instead"
NOT_TEXT = "a message with content other than text"
UNREADABLE_MESSAGES = "a cell with messages that are neither JSON nor Python"

_MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*["'](role|content|tool_calls|name|from|value)["']\s*:""")


class UnusableRowError(Exception):
    """Carries the reason why a row cannot be used."""


@dataclass(frozen=True)
class UnreadableCell:
    """Stands where a file had something that could not be read."""

    reason: str


def cell(row: Row, name: str) -> str | list[Message]:
    """The text or the messages in a column.

    Raises:
        UnusableRowError: There is neither.
    """
    value = row.get(name)
    if _is_missing(value):
        raise UnusableRowError(f"{name} is missing")
    if isinstance(value, UnreadableCell):
        raise UnusableRowError(value.reason)
    if isinstance(value, str):
        require_unicode(value)
        return str(value)
    if _is_list(value):
        return [_message(item) for item in value]
    raise UnusableRowError(f"{name} is neither text nor messages")


def template_arguments(row: Row) -> dict[str, Any]:
    """The tools and the further arguments of the chat template, as `ChatPair` takes them.

    Either may be JSON text, as files keep what differs from row to row.

    Raises:
        UnusableRowError: One of the columns holds something else.
    """
    tools, kwargs = (_structure(row.get(name)) for name in TEMPLATE_COLUMNS)
    tools = [] if _is_missing(tools) else tools
    if not _is_list(tools) or not all(isinstance(tool, Mapping) or callable(tool) for tool in tools):
        raise UnusableRowError(MALFORMED_TOOLS)
    kwargs = {} if _is_missing(kwargs) else kwargs
    if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
        raise UnusableRowError(MALFORMED_TEMPLATE_KWARGS)
    if "chat_template" in kwargs:
        raise UnusableRowError(OWN_TEMPLATE)
    for name in sorted(_RESERVED & kwargs.keys()):
        raise UnusableRowError(f"chat_template_kwargs sets {name}, which is not the template's")
    # Templates take an empty list of tools for a list of tools.
    return {
        "tools": [dict(tool) if isinstance(tool, Mapping) else tool for tool in tools] or None,
        "template_kwargs": {name: value for name, value in kwargs.items() if value is not None},
    }


def _message(value: object) -> Message:
    # Arrow fills the keys that only other messages have with None.
    message = {key: item for key, item in value.items() if item is not None} if isinstance(value, Mapping) else {}
    if "role" not in message and "from" in message:
        said = message.pop("from")
        message = {"role": _ROLES.get(said, said) if isinstance(said, str) else said, **message}
        if "content" not in message and "value" in message:
            message["content"] = message.pop("value")
    role, calls = message.get("role"), message.get("tool_calls", [])
    if not (isinstance(role, str) and role and _is_list(calls) and all(isinstance(call, Mapping) for call in calls)):
        raise UnusableRowError(MALFORMED_MESSAGES)
    if _is_list(message.get("content")):
        message["content"] = _joined(message["content"])
    content = message.get("content", "" if role == "assistant" and len(calls) else None)
    if not isinstance(content, str):
        raise UnusableRowError(MALFORMED_MESSAGES)
    require_unicode(content)
    return message


def _joined(blocks: Sequence[Any]) -> str:
    """The text of a message that is written as blocks, as models for images too have it."""
    texts = [block.get("text") if isinstance(block, Mapping) else None for block in blocks]
    if not all(isinstance(text, str) for text in texts):
        raise UnusableRowError(NOT_TEXT)
    return "".join(map(str, texts))


def says_nothing(completion: Sequence[Message] | str) -> bool:
    """Whether a completion holds neither a word nor a tool call."""
    if isinstance(completion, str):
        return not completion.strip()
    return not any(message.get("content", "").strip() or len(message.get("tool_calls", ())) for message in completion)


def require_text(*completions: Sequence[Message] | str) -> None:
    """Raise `UnusableRowError` unless each completion says something."""
    if any(map(says_nothing, completions)):
        raise UnusableRowError(EMPTY_COMPLETION)


def require_unicode(text: str) -> None:
    """Raise `UnusableRowError` for a lone surrogate, which JSON can spell and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UnusableRowError(INVALID_UNICODE) from None


# ----------------------------------------------------------------------------------------- what containers do to values


def without_nones(value: Any) -> Any:
    """A nested value without the keys that are None, and with lists for arrays.

    Arrow gives each mapping of a column the keys of all of them: a tool's argument that only another tool has would
    be written out as None.
    """
    if isinstance(value, Mapping):
        return {key: without_nones(item) for key, item in value.items() if item is not None}
    return [without_nones(item) for item in value] if _is_list(value) else value


def csv_cell(text: object) -> object:
    """What a cell of a CSV file holds: messages if it looks like them, else the text as it is."""
    if not isinstance(text, str) or not _MESSAGES_AS_TEXT.match(text):
        return text
    value = _structure(text)
    return UnreadableCell(UNREADABLE_MESSAGES) if value is text else value


def _structure(value: object) -> Any:
    """What a text means as JSON, or as Python writes lists and dictionaries; the text itself if neither."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of strange backslashes
            return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value


def _is_missing(value: object) -> bool:
    # Every missing value of pandas is unlike itself, or None, or has no truth value.
    return value is None or type(value).__name__ == "NAType" or (isinstance(value, float) and np.isnan(value))


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list | tuple | np.ndarray)  # parquet read by pandas gives arrays of messages
