"""The `columns` of a gym or a configuration: which column is what, and which value of a label means which side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import numpy as np

from evollm.checks import nearest_name
from evollm.data.cells import is_missing
from evollm.data.shapes import FIRST, INSTRUCTION, SECOND, Kind, Values
from evollm.errors import ConfigurationError

IGNORE = "ignore"


@dataclass(frozen=True)
class ColumnMapping:
    """What a user says of the columns of a dataset.

    Attributes:
        roles: For each role the column that has it.
        values: For each meaning of the label the values that have it; empty: what they mean in the shape of the rows.
        ignore: Columns that are knowingly not used.
        spoken: Whether strings are turns of a conversation: the prompt was named as an `instruction`.
    """

    roles: Mapping[str, str] = field(default_factory=dict)
    values: Values = field(default_factory=dict)
    ignore: frozenset[str] = frozenset()
    spoken: bool = False

    def key(self, role: str) -> str:
        """What the user has called a role."""
        return f"columns.{INSTRUCTION if self.spoken and role == 'prompt' else role}"


def mapping_of(columns: object, kind: Kind) -> ColumnMapping:
    """Check a mapping of roles to columns.

    Args:
        columns: None, or such as `{"prompt": "question", "ignore": ["id"]}`. `instruction` is a prompt that is a turn
            of a conversation, as its sides are then: with a chat template they go through it. `label` is a column, or
            a mapping of `column` and, of pairs, `first`, `second` and perhaps `tie`, of examples `good` and `bad`, each
            a value or a list of values.
        kind: What the dataset is for.

    Raises:
        ConfigurationError: It is something else; the message names the entry.
    """
    if columns is None:
        return ColumnMapping()
    if not isinstance(columns, Mapping):
        raise ConfigurationError("columns", columns, "must be a mapping of roles to columns, such as prompt: question")
    columns, spoken = _with_prompt(columns)
    roles: dict[str, str] = {}
    values: Values = {}
    ignore: frozenset[str] = frozenset()
    for role, column in columns.items():
        if role == IGNORE:
            ignore = frozenset(_names("columns.ignore", column))
        elif role not in kind.roles:
            known = (*kind.roles, INSTRUCTION, IGNORE)
            fix = f"is none of {', '.join(known)}; the nearest is {nearest_name(str(role), known)!r}"
            raise ConfigurationError(f"columns.{role}", column, fix)
        elif role == "label" and isinstance(column, Mapping):
            roles[role], values = _label(column, kind)
        else:
            roles[role] = _name(f"columns.{role}", column)
    for name in (FIRST, SECOND):
        if ({FIRST, SECOND} & roles.keys()) and name not in roles:
            raise ConfigurationError("columns", dict(columns), f"names one of two answers: say {name} too")
    if FIRST in roles and "label" not in roles:
        fix = "must say which answer is better: label: {column: ..., first: 1, second: 2}"
        raise ConfigurationError("columns.label", None, fix)
    return ColumnMapping(roles, values, ignore, spoken)


def _with_prompt(columns: Mapping[Any, Any]) -> tuple[Mapping[Any, Any], bool]:
    """The mapping with the column of an instruction as its prompt, and whether there was one."""
    if INSTRUCTION not in columns:
        return columns, False
    column = _name("columns.instruction", columns[INSTRUCTION])
    if "prompt" in columns:
        raise ConfigurationError("columns.instruction", column, "is the prompt as a turn: leave one of the two out")
    return {("prompt" if role == INSTRUCTION else role): entry for role, entry in columns.items()}, True


def value_of(value: object) -> str | None:
    """A label as text, the same for what containers make of it: 1, 1.0 and "1" are "1", True and "True" are "true".

    None: there is none.
    """
    if is_missing(value):
        return None
    if isinstance(value, bool | np.bool_):
        return str(bool(value)).lower()
    text = str(value).strip()
    if isinstance(value, Integral | Real) or text:
        try:
            number = float(text)
        except ValueError:
            return text.lower()
        return str(int(number)) if number.is_integer() else str(number)
    return None


def _label(entry: Mapping[Any, Any], kind: Kind) -> tuple[str, Values]:
    column = _name("columns.label.column", entry.get("column"))
    values: dict[str, tuple[str, ...]] = {}
    for meaning, given in entry.items():
        if meaning == "column":
            continue
        where = f"columns.label.{meaning}"
        if meaning not in kind.meanings:
            raise ConfigurationError(where, given, f"is none of {', '.join(('column', *kind.meanings))}")
        listed = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
        found = [value_of(one) for one in listed]
        for one, text in zip(listed, found, strict=True):
            if text is None or any(text in others for others in values.values()):
                raise ConfigurationError(where, one, "must be a value of the label that means nothing else")
        values[str(meaning)] = tuple(text for text in found if text is not None)
    for meaning in kind.meanings[:2]:
        if values and not values.get(meaning):
            raise ConfigurationError(f"columns.label.{meaning}", None, "say which value of the label means it")
    return column, values


def _name(where: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigurationError(where, value, "must be the name of a column")
    return value


def _names(where: str, value: object) -> list[str]:
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, Sequence):
        raise ConfigurationError(where, value, "must be a list of columns that are not to be used")
    return [_name(where, one) for one in listed]
