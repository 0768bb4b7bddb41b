"""A row as texts or as chat messages: a pair, or an example with one completion."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from evollm.data.cells import Message

# (start, end) of each of the assistant's turns, in characters of a completion, in order.
Spans: TypeAlias = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class TextPair:
    """A preference pair of strings; `prompt + chosen` and `prompt + rejected` are the two whole texts.

    Attributes:
        row: Position of the pair's row in the user's dataset.
        prompt: The common prompt of both completions; may be empty.
        chosen: The preferred completion.
        rejected: The other completion; None: an example for SFT, which has one completion.
        remarks: Irregularities of the row, for the report.
        label: The label of a single completion, for algorithms that learn from labels; None: no label.
        scored: For each completion the spans of the assistant's turns if the completion has other turns too, else None;
            empty: no completion has other turns.
        others: Values of the row's columns without a role, by name, if rows keep them.
    """

    row: int
    prompt: str
    chosen: str
    rejected: str | None = None
    scored: tuple[Spans | None, ...] = ()
    remarks: tuple[str, ...] = field(default=(), compare=False, kw_only=True)
    label: float | None = field(default=None, kw_only=True)
    others: Mapping[str, Any] = field(default_factory=dict, compare=False, kw_only=True)

    @property
    def question(self) -> str:
        """The prompt without surrounding whitespace."""
        return self.prompt.strip()

    @property
    def asked(self) -> str:
        """The prompt as the row has it."""
        return self.prompt

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """Empty, since a plain text has no roles."""
        return ()

    @property
    def completions(self) -> tuple[str, ...]:
        """The one or two completions, the chosen one first."""
        return (self.chosen,) if self.rejected is None else (self.chosen, self.rejected)


@dataclass(frozen=True)
class ChatPair:
    """A preference pair of chat messages; `prompt + chosen` and `prompt + rejected` are the two conversations.

    Attributes:
        row: Position of the pair's row in the user's dataset.
        prompt: The messages before the completion, at least one.
        chosen: The messages of the preferred completion, at least one.
        rejected: The messages of the other completion, at least one; None: an example for SFT.
        tools: Functions or JSON schemas of tools, passed to the chat template; None: no tools.
        template_kwargs: Further arguments of the chat template, such as `enable_thinking`.
        remarks: Irregularities of the row, for the report.
        label: Like `TextPair.label`.
        others: Like `TextPair.others`.
        plain: For a row of strings the pair as text, used for a tokenizer without a chat template; else None.
    """

    row: int
    prompt: Sequence[Message]
    chosen: Sequence[Message]
    rejected: Sequence[Message] | None = None
    tools: Sequence[Any] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = field(default=(), compare=False, kw_only=True)
    label: float | None = field(default=None, kw_only=True)
    others: Mapping[str, Any] = field(default_factory=dict, compare=False, kw_only=True)
    plain: TextPair | None = field(default=None, compare=False, kw_only=True)

    @property
    def question(self) -> str:
        """The text of the prompt's last message, without surrounding whitespace."""
        return str(self.prompt[-1].get("content", "")).strip()

    @property
    def asked(self) -> str | list[Message]:
        """The prompt as the row has it: a string if it has no messages."""
        return list(self.prompt) if self.plain is None else self.plain.prompt

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """Role and text of each message in the prompt; the text of a tool call is the call as JSON."""
        return tuple((str(message["role"]), _said(message)) for message in self.prompt)

    @property
    def completions(self) -> tuple[Sequence[Message], ...]:
        """The one or two completions, the chosen one first."""
        return (self.chosen,) if self.rejected is None else (self.chosen, self.rejected)


def _said(message: Message) -> str:
    text = str(message.get("content") or "").strip()
    calls = json.dumps(message["tool_calls"], ensure_ascii=False) if message.get("tool_calls") else ""
    return "\n".join(part for part in (text, calls) if part)


def in_form(pair: TextPair | ChatPair, has_template: bool) -> TextPair | ChatPair:
    """The pair itself, or the pair as text if the row was text and the tokenizer has no chat template."""
    if isinstance(pair, ChatPair) and pair.plain is not None and not has_template:
        return pair.plain
    return pair
