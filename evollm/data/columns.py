"""Which column of a dataset has which role: what the user says (`columns=`), and else what the column names mean."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import numpy as np

from evollm.checks import nearest_name
from evollm.data.cells import is_missing
from evollm.data.column_hints import (
    hint_about_conflict,
    hint_about_missing,
    hint_about_missing_prompt,
    hint_about_unused,
    nearest_column,
)
from evollm.data.shapes import FIRST, IMAGES, INSTRUCTION, PROMPT, SECOND, Kind, Shape, Values
from evollm.errors import ConfigurationError, DataError

IGNORE = "ignore"


@dataclass(frozen=True)
class ColumnMapping:
    """The `columns` argument, checked.

    Attributes:
        roles: For each role the column that the user gave it.
        values: For each meaning of the label the cell values that have it. Empty: those of the dataset's shape hold.
        ignore: Columns that the user leaves out on purpose.
        spoken: Whether the prompt was named as an `instruction`: string cells are then turns of a conversation.
    """

    roles: Mapping[str, str] = field(default_factory=dict)
    values: Values = field(default_factory=dict)
    ignore: frozenset[str] = frozenset()
    spoken: bool = False

    def key(self, role: str) -> str:
        """The name of a role in the user's argument, for messages."""
        return f"columns.{INSTRUCTION if self.spoken and role == 'prompt' else role}"


def mapping_of(columns: object, kind: Kind) -> ColumnMapping:
    """Check the `columns` argument of a gym or a configuration.

    Args:
        columns: None, or a mapping of roles to columns such as `{"prompt": "question", "ignore": ["id"]}`.
            `instruction` names a prompt whose string cells are a user's turn, answered by the assistant: they go
            through the tokenizer's chat template. `label` is a column, or a mapping of `column` and of what its values
            mean: `first`, `second` and optionally `tie` for pairs, `good` and `bad` for completions, each a value or a
            list of values.
        kind: What the dataset is for.

    Raises:
        ConfigurationError: The argument or one of its entries is invalid; the message names the entry.
    """
    if columns is None:
        return ColumnMapping()
    if not isinstance(columns, Mapping):
        raise ConfigurationError("columns", columns, "must be a mapping of roles to columns, such as prompt: question")
    spoken = INSTRUCTION in columns
    if spoken:
        columns = _with_instruction_as_prompt(columns)
    roles: dict[str, str] = {}
    values: Values = {}
    ignore: frozenset[str] = frozenset()
    for role, entry in columns.items():
        if role == IGNORE:
            ignore = _ignored_columns(entry)
        elif role not in kind.roles:
            known = (*kind.roles, INSTRUCTION, IGNORE)
            fix = f"is none of {', '.join(known)}; the nearest is {nearest_name(str(role), known)!r}"
            raise ConfigurationError(f"columns.{role}", entry, fix)
        elif role == "label" and isinstance(entry, Mapping):
            roles[role], values = _label_mapping(entry, kind)
        else:
            roles[role] = _column_name(f"columns.{role}", entry)
    other_answer = {FIRST, SECOND} - roles.keys()
    if len(other_answer) == 1:
        fix = f"names one of two answers: say {other_answer.pop()} too"
        raise ConfigurationError("columns", dict(columns), fix)
    if FIRST in roles and "label" not in roles:
        fix = "must say which answer is better: label: {column: ..., first: 1, second: 2}"
        raise ConfigurationError("columns.label", None, fix)
    return ColumnMapping(roles, values, ignore, spoken)


def _with_instruction_as_prompt(columns: Mapping[Any, Any]) -> dict[Any, Any]:
    column = _column_name("columns.instruction", columns[INSTRUCTION])
    if "prompt" in columns:
        raise ConfigurationError("columns.instruction", column, "is the prompt as a turn: leave one of the two out")
    return {("prompt" if role == INSTRUCTION else role): entry for role, entry in columns.items()}


def _ignored_columns(entry: object) -> frozenset[str]:
    names = [entry] if isinstance(entry, str) else entry
    if not isinstance(names, Sequence):
        raise ConfigurationError("columns.ignore", entry, "must be a list of columns that are not to be used")
    return frozenset(_column_name("columns.ignore", name) for name in names)


def _label_mapping(entry: Mapping[Any, Any], kind: Kind) -> tuple[str, Values]:
    """The column of a label and, for each meaning, its values as `value_of` writes them."""
    column = _column_name("columns.label.column", entry.get("column"))
    values: dict[str, tuple[str, ...]] = {}
    for meaning, given in entry.items():
        if meaning == "column":
            continue
        where = f"columns.label.{meaning}"
        if meaning not in kind.meanings:
            raise ConfigurationError(where, given, f"is none of {', '.join(('column', *kind.meanings))}")
        listed = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
        found: list[str] = []
        for value in listed:
            text = value_of(value)
            if text is None or any(text in others for others in values.values()):
                raise ConfigurationError(where, value, "must be a value of the label that means nothing else")
            found.append(text)
        values[str(meaning)] = tuple(found)
    for meaning in kind.meanings[:2]:
        if values and not values.get(meaning):
            raise ConfigurationError(f"columns.label.{meaning}", None, "say which value of the label means it")
    return column, values


def _column_name(where: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigurationError(where, value, "must be the name of a column")
    return value


def value_of(value: object) -> str | None:
    """A label as text, equal for equal values of different types; None for a missing label.

    1, 1.0 and "1" become "1"; True and "True" become "true".
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


@dataclass(frozen=True)
class Layout:
    """The roles of a dataset's columns.

    Attributes:
        shape: Name of the shape that the columns match.
        roles: For each role the column that has it.
        values: For each meaning of the label the values that have it.
        unused: The columns without a role.
        needs_label: Whether the label is a part of what is learnt, so that every value must have a meaning.
    """

    shape: str
    roles: Mapping[str, str]
    values: Values = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    needs_label: bool = False

    def meaning(self, label: object) -> str | None:
        """What a value of the label means, such as "first"; None for a value that is not known."""
        text = value_of(label)
        return next((meaning for meaning, values in self.values.items() if text in values), None)


def layout_of(columns: Sequence[str], kind: Kind, mapping: ColumnMapping, where: str) -> Layout:
    """Assign roles to the columns of a dataset.

    Args:
        columns: Names of the dataset's columns.
        kind: What the dataset is for.
        mapping: The user's assignment, which comes first.
        where: The user's name for the dataset, for messages.

    Raises:
        DataError: A column that is needed is missing, or one that would change the meaning of rows has no role.
    """
    names = [column for column in columns if isinstance(column, str)]
    seen = f"columns {list(columns)}"
    for role, column in mapping.roles.items():
        if column not in names:
            near = nearest_column(column, names)
            hint = f", perhaps {near!r}" if near else ""
            raise DataError(where, seen, f"has no column {column!r}, which {mapping.key(role)} names{hint}")
    free = [name for name in names if name not in {*mapping.roles.values(), *mapping.ignore}]
    shape = next((shape for shape in kind.shapes if _matches(shape, mapping, free)), None)
    if shape is None:
        hint = hint_about_missing_prompt(free) if kind is PROMPT else hint_about_missing(free, kind, mapping.roles)
        raise DataError(where, seen, hint)
    roles = {role: mapping.roles.get(role) or name for role, name in shape.needs.items()}
    for role, candidates in shape.takes.items():
        found = mapping.roles.get(role) or next((name for name in candidates if name in free), None)
        if found is not None:
            roles[role] = found
    not_taken = [role for role in mapping.roles if role not in roles]
    if not_taken:
        fix = f"{mapping.key(not_taken[0])} has no place in rows of the shape {shape.name!r}; leave it out"
        raise DataError(where, seen, fix)
    values = (mapping.values or shape.label) if "label" in roles else {}
    if "label" in roles and not values:
        fix = f"which value of {roles['label']!r} means what? columns: {{label: {{column: {roles['label']}, ...}}}}"
        raise DataError(where, seen, fix)
    unused = [name for name in names if name not in roles.values()]
    not_ignored = [name for name in unused if name in free and (not kind.keeps_others or name in IMAGES)]
    fix = hint_about_conflict(shape, unused, kind) or hint_about_unused(not_ignored, roles, kind)
    if fix:
        raise DataError(where, seen, fix)
    return Layout(shape.name, roles, values, tuple(unused), "label" in shape.needs)


def _matches(shape: Shape, mapping: ColumnMapping, free: Collection[str]) -> bool:
    """Whether columns match a shape, given by the user or, of the `free` ones, by their names."""
    given = mapping.roles.keys()
    # A user who names two answers and a label has no rows with a chosen side, whatever the other columns are called.
    if {FIRST, "messages", "text", "completion"} & given - shape.needs.keys():
        return False
    return all(role in given or (name and name in free) for role, name in shape.needs.items())
