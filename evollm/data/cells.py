"""Values of single cells: text, chat messages, earlier turns, tools and further arguments of the chat template."""

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

# Roles of columns whose values go to the chat template beside the messages.
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
# Roles of messages that a model is given: a completion cannot start with one of these.
PROMPT_ROLES = frozenset({"system", "developer", "user", "tool"})
# ShareGPT's names for the roles.
_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
# Arguments of `apply_chat_template` that evollm gives itself, or that would have it return something else than text.
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
NOT_TO_BE_LEARNT = "a completion that says that it is not to be learnt (weight 0, or train: false)"
WITHOUT_ROLES = "a list of texts that do not say who speaks (role and content)"
MALFORMED_TOOLS = "tools is not a list of functions or JSON schemas"
MALFORMED_TEMPLATE_KWARGS = "chat_template_kwargs is not a mapping of names to values"
# A template is a program, and one from a dataset could run without end.
OWN_TEMPLATE = "chat_template_kwargs brings a chat template of its own: set tokenizer.chat_template instead"
NOT_TEXT = "a message with content other than text"
UNREADABLE_MESSAGES = "a cell with messages that are neither JSON nor Python"
MALFORMED_HISTORY = "history is not a list of [question, answer]"

# Text that begins like a message, or a list of them, as JSON or as Python's repr. A completion may be JSON too: it is a
# message only with a role.
_MESSAGES_AS_TEXT = re.compile(r"""\s*\[?\s*\{\s*["'](role|content|tool_calls|name|from|value)["']\s*:""")
# Text that may hold messages with other first keys, or JSON within a JSON string.
_MAY_HOLD_MESSAGES = re.compile(r"""\s*(\[\s*\{|"\s*\[?\s*\{)""")
_ROLE_KEYS = ("role", "from")
_TURN = ("user", "assistant")


class UnusableRowError(Exception):
    """A row cannot be used; the message is the reason, as the report counts it."""


@dataclass(frozen=True)
class UnreadableCell:
    """The value of a cell that has none to read; `reason` says why."""

    reason: str


def cell(row: Row, name: str) -> str | list[Message]:
    """The text or the messages in a column. Messages that are text, as CSV files have them, are parsed.

    Raises:
        UnusableRowError: The cell is missing, or neither text nor messages.
    """
    value = row.get(name)
    if is_missing(value):
        raise UnusableRowError(f"{name} is missing")
    if isinstance(value, UnreadableCell):
        raise UnusableRowError(value.reason)
    if isinstance(value, str):
        value = _parsed_messages(value)
    if isinstance(value, str):
        require_unicode(value)
        return str(value)
    if isinstance(value, Mapping):
        return [_message(value)]
    if _is_list(value):
        if len(value) and all(isinstance(item, str) for item in value):
            raise UnusableRowError(WITHOUT_ROLES)
        return [_message(item) for item in value]
    raise UnusableRowError(f"{name} is neither text nor messages")


def optional_text(row: Row, name: str) -> str:
    """The text in a column; "" if it is missing.

    Raises:
        UnusableRowError: The cell holds something else than text.
    """
    value = row.get(name)
    if is_missing(value):
        return ""
    if not isinstance(value, str):
        raise UnusableRowError(f"{name} is not text")
    require_unicode(value)
    return str(value) if value.strip() else ""


def history(row: Row) -> list[Message]:
    """The turns before the prompt, from messages or from a list of [question, answer].

    Raises:
        UnusableRowError: The cell holds something else.
    """
    value = _parsed(row.get("history"))
    if is_missing(value) or value == "":
        return []
    if not _is_list(value):
        raise UnusableRowError(MALFORMED_HISTORY)
    if any(isinstance(turn, Mapping) for turn in value):
        return [_message(turn) for turn in value]
    found: list[Message] = []
    for turn in value:
        if not _is_list(turn) or len(turn) != len(_TURN) or not all(isinstance(text, str) for text in turn):
            raise UnusableRowError(MALFORMED_HISTORY)
        found += [{"role": role, "content": str(text)} for role, text in zip(_TURN, turn, strict=True)]
    for message in found:
        require_unicode(message["content"])
    return found


def template_arguments(row: Row) -> dict[str, Any]:
    """The tools and the further arguments of the chat template, as `ChatPair` takes them.

    Either cell may be JSON text, in which files keep values whose keys differ from row to row.

    Raises:
        UnusableRowError: `tools` is not a list of functions or schemas, or `chat_template_kwargs` not a mapping.
    """
    tools, kwargs = (_parsed(row.get(name)) for name in TEMPLATE_COLUMNS)
    tools = [] if is_missing(tools) else tools
    if not _is_list(tools) or not all(isinstance(tool, Mapping) or callable(tool) for tool in tools):
        raise UnusableRowError(MALFORMED_TOOLS)
    kwargs = {} if is_missing(kwargs) else kwargs
    if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
        raise UnusableRowError(MALFORMED_TEMPLATE_KWARGS)
    if "chat_template" in kwargs:
        raise UnusableRowError(OWN_TEMPLATE)
    for name in sorted(_RESERVED & kwargs.keys()):
        raise UnusableRowError(f"chat_template_kwargs sets {name}, which is not the template's")
    # None instead of []: templates write a header for an empty list.
    return {
        "tools": [dict(tool) if isinstance(tool, Mapping) else tool for tool in tools] or None,
        "template_kwargs": {name: value for name, value in kwargs.items() if value is not None},
    }


def _message(value: object) -> Message:
    # In Arrow all messages of a column have the same keys, with None for those that a message lacks.
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
        message["content"] = _text_of_blocks(message["content"])
    content = message.get("content", "" if role == "assistant" and len(calls) else None)
    if not isinstance(content, str):
        raise UnusableRowError(MALFORMED_MESSAGES)
    require_unicode(content)
    return message


def _text_of_blocks(blocks: Sequence[Any]) -> str:
    """The text of a message whose content is a list of blocks, the format of models with image input."""
    texts = [block.get("text") if isinstance(block, Mapping) else None for block in blocks]
    if not all(isinstance(text, str) for text in texts):
        raise UnusableRowError(NOT_TEXT)
    return "".join(map(str, texts))


def says_nothing(completion: Sequence[Message] | str) -> bool:
    """Whether a completion has neither text nor a tool call."""
    if isinstance(completion, str):
        return not completion.strip()
    return not any(message.get("content", "").strip() or len(message.get("tool_calls", ())) for message in completion)


def is_learnt(message: Message, first: Message) -> bool:
    """Whether the loss is over this message of a completion, whose first message is `first`.

    It is over the assistant's messages, except those with a `weight` of 0 (OpenAI) or `train: false` (axolotl).
    """
    is_left_out = message.get("weight") == 0 or message.get("train") is False or message.get("training") is False
    return message["role"] in (first["role"], "assistant") and not is_left_out


def is_learnt_in_part(completion: Sequence[Message]) -> bool:
    """Whether a completion has messages that are not to be learnt."""
    return not all(is_learnt(message, completion[0]) for message in completion)


def require_text(*completions: Sequence[Message] | str) -> None:
    """Raise `UnusableRowError` unless each completion has text or a tool call that is to be learnt."""
    if any(map(says_nothing, completions)):
        raise UnusableRowError(EMPTY_COMPLETION)
    for side in completions:
        if not isinstance(side, str) and not any(is_learnt(message, side[0]) for message in side):
            raise UnusableRowError(NOT_TO_BE_LEARNT)


def require_unicode(text: str) -> None:
    """Raise `UnusableRowError` for a lone surrogate, which JSON can escape but UTF-8 and tokenizers cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UnusableRowError(INVALID_UNICODE) from None


# --------------------------------------------------------------------------------- values as files and Arrow keep them


def without_nones(value: Any) -> Any:
    """A nested value without the keys that are None, and with lists for arrays.

    In Arrow all mappings of a column have the same keys. Without this a template would write the arguments of other
    tools, as None.
    """
    if isinstance(value, Mapping):
        return {key: without_nones(item) for key, item in value.items() if item is not None}
    return [without_nones(item) for item in value] if _is_list(value) else value


def _parsed_messages(text: str) -> object:
    """The messages that a text holds as JSON or as Python's repr; else the text itself.

    Raises:
        UnusableRowError: The text looks like messages and cannot be parsed.
    """
    looks = _MESSAGES_AS_TEXT.match(text)
    if not looks:
        found = _parsed(text) if _MAY_HOLD_MESSAGES.match(text) else text
        if isinstance(found, str) and found != text and len(found) < len(text):
            inner = _parsed_messages(found)  # JSON in JSON
            return text if isinstance(inner, str) else inner
        return found if _is_list(found) and found and all(map(_is_whole_message, found)) else text
    value = _parsed(text)
    items = [value] if isinstance(value, Mapping) else value
    if isinstance(items, str):
        if looks[1] in (*_ROLE_KEYS, "content") and text.lstrip().startswith("["):
            raise UnusableRowError(UNREADABLE_MESSAGES)
        return text
    says_who = any(
        isinstance(item, Mapping) and any(isinstance(item.get(who), str) for who in _ROLE_KEYS) for item in items
    )
    return value if says_who else text


def _is_whole_message(item: object) -> bool:
    return isinstance(item, Mapping) and any(
        isinstance(item.get(who), str) and isinstance(item.get(what), str)
        for who, what in zip(_ROLE_KEYS, ("content", "value"), strict=True)
    )


def _parsed(value: object) -> Any:
    """A text parsed as JSON, else as a Python literal; the value itself if it is neither."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SyntaxWarning for backslashes
            return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value


def is_missing(value: object) -> bool:
    """Whether a cell has no value: None, NaN, or `NA` and `NaT` of pandas."""
    return value is None or type(value).__name__ == "NAType" or (isinstance(value, float) and np.isnan(value))


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list | tuple | np.ndarray)  # pandas reads lists of a Parquet file as arrays
