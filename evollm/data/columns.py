"""Which columns of a dataset are read as what; those that matter are understood, or refused by name."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from evollm.data.mapping import ColumnMapping, value_of
from evollm.data.shapes import (
    ANSWERS,
    CONVERSATIONS,
    EXAMPLE,
    FIRST,
    GOODNESS,
    IMAGES,
    LABELS,
    MEANT,
    PAIR,
    SEVERAL,
    Kind,
    Shape,
    Values,
)
from evollm.data.two_answers import UNKNOWN_LABEL, good_or_bad, in_yaml, two_answers
from evollm.errors import DataError

# Columns that a dataset need not have, so that nobody would notice that they are not read.
_OPTIONAL = ("prompt", "tools", "chat_template_kwargs")
# How alike names are, from 0 to 1. A column that is not needed must be very like one that is known to be taken for it:
# a dataset may well have a prompt_id.
_MISSING_LIKE, _UNUSED_LIKE = 0.6, 0.85


@dataclass(frozen=True)
class Layout:
    """What the columns of a dataset are.

    Attributes:
        shape: The shape that they have.
        roles: For each role the column that has it.
        values: For each meaning of a label its values.
        unused: The other columns.
    """

    shape: str
    roles: Mapping[str, str]
    values: Values = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    def meaning(self, label: object) -> str | None:
        """What a value of the label means, such as "first"; None: nothing that is known."""
        text = value_of(label)
        return next((meaning for meaning, values in self.values.items() if text in values), None)


def layout_of(columns: Sequence[str], kind: Kind, mapping: ColumnMapping, where: str) -> Layout:
    """Find out what columns are.

    Args:
        columns: Their names.
        kind: What the dataset is for.
        mapping: What its user says of them.
        where: What the user calls the dataset, for messages.

    Raises:
        DataError: One that is needed is missing, or one that matters would not be used.
    """
    names = [column for column in columns if isinstance(column, str)]
    seen = f"columns {list(columns)}"
    for role, column in mapping.roles.items():
        if column not in names:
            near = _nearest(column, names, _MISSING_LIKE)
            hint = f", perhaps {near!r}" if near else ""
            raise DataError(where, seen, f"has no column {column!r}, which {mapping.key(role)} names{hint}")
    free = [name for name in names if name not in {*mapping.roles.values(), *mapping.ignore}]
    shape = next((shape for shape in kind.shapes if _fits(shape, mapping, free)), None)
    if shape is None:
        raise DataError(where, seen, _lacking(free, kind, mapping))
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
    left = [name for name in unused if name in free]
    fix = _conflict(shape, unused, kind) or _unused_that_matters(left, roles, kind) or _unused_of_examples(left, roles)
    if fix:
        raise DataError(where, seen, fix)
    return Layout(shape.name, roles, values, tuple(unused))


def _fits(shape: Shape, mapping: ColumnMapping, free: Collection[str]) -> bool:
    given = mapping.roles.keys()
    # Rows with two answers of which a label says the better one are not rows whose sides are known.
    if {FIRST, "messages", "text", "completion"} & given - shape.needs.keys():
        return False
    return all(role in given or (name and name in free) for role, name in shape.needs.items())


# ------------------------------------------------------------------------------------------------------ what is missing


def _lacking(columns: Sequence[str], kind: Kind, mapping: ColumnMapping) -> str:
    several = next((name for name in SEVERAL if name in columns and not mapping.roles), None)
    if several is not None and not _sides_of(columns, kind):
        return (
            f"is not a dataset of {'pairs' if kind is PAIR else 'prompts and completions'}: {several!r} holds several "
            "answers in a row; write a row of each that you want, with the columns "
            + " and ".join(("prompt", *kind.sides))
        )
    given = mapping.roles.keys()
    missing = [side for side in kind.sides if side not in columns and side not in given]
    line = suggestion(columns, kind, mapping)
    if kind is EXAMPLE:
        if "chosen" in columns:
            return (
                "holds preference pairs; pass them to PreferenceGym (algorithm=dpo), or rename chosen to completion to "
                "learn from it alone"
            )
        alias = next((name for name in MEANT["prompt"] if name in columns), None)
        if not missing and alias:
            return _would_not_be_used(alias, "prompt")
        missing = missing or ["prompt"]
        likely = missing if "prompt" in columns or missing == ["prompt"] else ["messages"]
        hint = _missing_hint(likely, columns, kind.names)
        to = "prompt and completion, or messages, or text"
        return f"lacks {missing[0]}{hint}; rename its columns to {to}{line and f', or {line}'}"
    hint = _missing_hint(missing, columns, kind.names)
    to = "chosen and rejected (and prompt, if there is one)"
    fix = f"rename its columns to {to}{line and f', or {line}'}"
    if not line and (_sides_of(columns, EXAMPLE) or {"messages", "conversations", "text"}.intersection(columns)):
        fix = f"rows with a completion or messages are for SFTGym: algorithm: sft, or --sft; for pairs {fix}"
    return f"lacks {' and '.join(missing)}{hint}; {fix}"


def suggestion(columns: Sequence[str], kind: Kind, mapping: ColumnMapping | None = None) -> str:
    """The line for a configuration that would make something of the columns; "" where none comes to mind."""
    roles = dict((mapping or ColumnMapping()).roles)
    free = [name for name in columns if name not in roles.values()]
    sides = _sides_of(free, kind)
    if not sides:
        return ""
    free = [name for name in free if name not in sides.values() and name not in sides.get("label", "")]
    given: dict[str, str] = {}
    prefix = f"{next(iter(sides.values())).partition('_')[0]}_"  # such as orig_instruction beside orig_response_A
    for role in ("prompt", "input", "system", "history"):
        names = (*(f"{prefix}{name}" for name in MEANT[role]), role, *MEANT[role])
        found = next((name for name in names if name in free and role not in roles), None)
        if found is not None and found not in given.values() and (role != "input" or "prompt" in given):
            given[role] = found
            free.remove(found)
    # What has the name of its role is found without being named.
    named = {role: name for role, name in {**given, **sides}.items() if name != role or role == "input"}
    parts = [f"{role}: {name if role == 'label' else in_yaml(name)}" for role, name in {**roles, **named}.items()]
    left = [name for name in free if _unused_that_matters([name], {**roles, **given, **sides}, kind)]
    inner = ", ".join([*parts, f"ignore: [{', '.join(map(in_yaml, left))}]"] if left else parts)
    unknown = UNKNOWN_LABEL in sides.get("label", "")
    where = (
        f", where {UNKNOWN_LABEL} is a column of yours that says which answer is better, by these values"
        if unknown
        else ""
    )
    return f"say which column is what, as in columns: {{{inner}}}{where}"


def _sides_of(columns: Sequence[str], kind: Kind) -> dict[str, str]:
    """The columns that look like answers, by role; of a label what a configuration would say."""
    if kind is EXAMPLE:
        found = next((name for name in ("completion", *ANSWERS["completion"]) if name in columns), None)
        good = next((name for name in columns if name.strip().lower() in GOODNESS), None)
        label = {"label": good_or_bad(good)} if good and found else {}
        return {"completion": found, **label} if found else {}
    named = {side: next((name for name in (side, *ANSWERS[side]) if name in columns), None) for side in kind.sides}
    if all(named.values()):
        return {side: name for side, name in named.items() if name}
    return two_answers(columns)


def _missing_hint(missing: Sequence[str], columns: Sequence[str], known: Collection[str]) -> str:
    """Which of the columns that are there may have been meant for those that are missing."""
    strangers = [column for column in columns if column not in known]
    pairs = [(_nearest(name, strangers, _MISSING_LIKE), name) for name in missing]
    hints = [f"is {column!r} meant to be {name!r}?" for column, name in pairs if column is not None]
    return f" ({' '.join(hints)})" if hints else ""


# ------------------------------------------------------------------------------------------------- what would be unused


def _conflict(shape: Shape, unused: Sequence[str], kind: Kind) -> str:
    """What cannot be in one dataset."""
    if kind is EXAMPLE:
        ways = ("messages", "conversations", "completion")
        mine = next((name for name in shape.needs.values() if name in ways), None)
        other = next((name for name in ways if name in unused), None)
        if mine and other:
            first, second = (other, mine) if mine == "completion" else (mine, other)
            return f"has both {first} and {second}; leave one of them out, or say columns: {{ignore: [{other}]}}"
    return ""


def _unused_that_matters(unused: Sequence[str], roles: Mapping[str, str], kind: Kind) -> str:
    """What is wrong with a dataset that has all it needs: a column that would be left unused by mistake; or ""."""
    for name in unused:
        if name in IMAGES:
            return (
                f"has a column {name!r}, and evollm tunes on text alone; leave it out if the text makes sense so, or "
                f"say columns: {{ignore: [{in_yaml(name)}]}}"
            )
    has_prompt = {"prompt", "conversation", "messages", "text"} & roles.keys()
    for name in unused:
        plain = name.strip().lower()
        role = next((role for role, names in MEANT.items() if plain in names), None)
        if role == "prompt" and has_prompt:
            role = "input" if plain in MEANT["input"] else role
        if role is not None:
            return _would_not_be_used(name, role)
        if plain in CONVERSATIONS:
            return _would_not_be_used(name, "prompt" if kind is PAIR else "messages")
        if kind is PAIR and "label" not in roles and plain in LABELS:
            fix = f"say columns: {{ignore: [{in_yaml(name)}]}} if chosen is the better side in all rows"
            return f"has a column {name!r} that would not be used; {fix}"
    optional = [role for role in _OPTIONAL if role not in roles and not (role == "prompt" and has_prompt)]
    for role in optional:
        column = _nearest(role, [name for name in unused if name not in kind.names], _UNUSED_LIKE)
        if column is not None:
            fix = f"rename it to {role}, or leave it out, or {_said(column, role)}"
            return f"has a column {column!r} that would not be used; {fix}"
    return ""


def _unused_of_examples(unused: Sequence[str], roles: Mapping[str, str]) -> str:
    """What is wrong with rows of examples of which something would be left unused; or ""."""
    if "text" in roles and "role" in unused:
        return (
            "has a column 'role' that would not be used: a row is one message; join those of a conversation in a "
            "column messages, or say columns: {ignore: [role]} to learn from all texts alike"
        )
    good = next((name for name in unused if name.strip().lower() in GOODNESS), None)
    if good is not None and {"completion", "messages", "text"} & roles.keys() and "label" not in roles:
        name = in_yaml(good)
        return (
            f"has a column {good!r} that would not be used; to learn from the good ones alone say columns: "
            f"{{label: {good_or_bad(good)}}}, or {{ignore: [{name}]}}"
        )
    return ""


def _would_not_be_used(column: str, role: str) -> str:
    said = _said(column, role)
    # There is no name by which further input is always taken for it.
    return f"has a column {column!r} that would not be used; " + (
        said if role == "input" else f"rename it to {role}, or {said}"
    )


def _said(column: str, role: str) -> str:
    name = in_yaml(column)
    return f"say columns: {{{role}: {name}}} or {{ignore: [{name}]}}"


def _nearest(name: str, columns: Sequence[str], cutoff: float) -> str | None:
    """The column whose name is most like this one, whatever its case."""
    plain = {column.strip().lower(): column for column in columns}
    found = difflib.get_close_matches(name, plain, 1, cutoff)
    return plain[found[0]] if found else None
