"""What error messages say about columns: what is missing, what would not be used, and which `columns=` would help.

Column names that no shape has are guessed at here, for messages alone: no row is ever read by a guess.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Mapping, Sequence

from evollm.data.shapes import (
    CONVERSATIONS,
    EXAMPLE,
    FIRST,
    GOOD_OR_BAD_NAMES,
    IMAGES,
    INPUT_NAMES,
    LABELS,
    LIST_NAMES,
    OTHER_LABELS,
    PAIR,
    SECOND,
    SIDE_NAMES,
    TIE,
    UNPAIRED,
    Kind,
    Shape,
)

# Roles that a dataset need not have, so that a misspelt column would go unnoticed.
_OPTIONAL = ("prompt", "tools", "chat_template_kwargs")
# How alike two names must be, from 0 to 1. The bound for optional columns is the stricter one: `prompt_id` is none.
_MISSING_LIKE, _UNUSED_LIKE = 0.6, 0.85
# Parts of names of columns that come in twos and hold no answers.
_NO_ANSWERS = frozenset(
    {"id", "ids", "model", "score", "scores", "rating", "annotator", "label", "rank", "safe", "name"}
)
# Parts of names of columns with answers; such columns are preferred to others that come in twos.
_ANSWER_WORDS = frozenset(
    {
        *("answer", "response", "output", "completion", "reply", "generation", "candidate", "summary", "text", "ref"),
        *("conversation", "chosen", "solution"),
    }
)
# Parts of names of columns that say which of two answers is better.
_LABEL_WORDS = frozenset({"preference", "preferred", "winner", "better", "label", "choice", "verdict"})
# Labels from -3, the first answer is much better, to 3: HelpSteer 2 and 3.
_STRENGTHS = ("overall_preference", "preference_strength")
# How the names of two answers differ, in one character, and the usual values of their label: first, second, tie.
_ENDINGS = (("1", "2", "0"), ("0", "1", "-1"), ("a", "b", "tie"))
UNKNOWN_LABEL = "LABEL"
# Names that YAML reads as text without quotation marks; those that begin with a digit could be numbers.
_PLAIN_IN_YAML = re.compile(r"[A-Za-z][\w.-]*( [\w.-]+)*")


def nearest_column(name: str, columns: Sequence[str], cutoff: float = _MISSING_LIKE) -> str | None:
    """The column whose name is most similar to this one, in any case; None if no similarity reaches the cutoff."""
    plain = {column.strip().lower(): column for column in columns}
    found = difflib.get_close_matches(name, plain, 1, cutoff)
    return plain[found[0]] if found else None


# ----------------------------------------------------------------------------------------------------- missing columns


def hint_about_missing(columns: Sequence[str], kind: Kind, given: Mapping[str, str]) -> str:
    """What a dataset that matches no shape lacks, and what to do about it.

    `columns` are those that the user neither gave a role nor ignores, `given` the roles and columns that they gave.
    """
    several = next((name for name in LIST_NAMES if name in columns and not given), None)
    if several is not None and not _likely_sides(columns, kind):
        return (
            f"is not a dataset of {'pairs' if kind is PAIR else 'prompts and completions'}: {several!r} holds several "
            "answers in a row; write a row of each that you want, with the columns "
            + " and ".join(("prompt", *kind.sides))
        )
    missing = [side for side in kind.sides if side not in columns and side not in given]
    line = _suggested_mapping(columns, kind, given)
    if kind is UNPAIRED:
        return _hint_about_unpaired(columns, given, missing, line)
    if kind is EXAMPLE:
        if "chosen" in columns:
            return (
                "holds preference pairs; pass them to PreferenceGym (algorithm=dpo), or rename chosen to completion to "
                "learn from it alone"
            )
        alias = next((name for name in INPUT_NAMES["prompt"] if name in columns), None)
        if not missing and alias:
            return _would_not_be_used(alias, "prompt")
        missing = missing or ["prompt"]
        likely = missing if "prompt" in columns or missing == ["prompt"] else ["messages"]
        hint = _similar_columns(likely, columns, kind.names)
        to = "prompt and completion, or messages, or text"
        return f"lacks {missing[0]}{hint}; rename its columns to {to}{line and f', or {line}'}"
    hint = _similar_columns(missing, columns, kind.names)
    to = "chosen and rejected (and prompt, if there is one)"
    fix = f"rename its columns to {to}{line and f', or {line}'}"
    if not line and (_likely_sides(columns, EXAMPLE) or {"messages", "conversations", "text"}.intersection(columns)):
        fix = f"rows with a completion or messages are for SFTGym: algorithm: sft, or --sft; for pairs {fix}"
        fix = f"rows with a label are for UnpairedGym: algorithm: kto; {fix}" if "label" in columns else fix
    return f"lacks {' and '.join(missing)}{hint}; {fix}"


def hint_about_missing_prompt(columns: Sequence[str]) -> str:
    """What a dataset of prompts alone lacks; `columns` are those that have no role and are not ignored."""
    alias = next((name for name in INPUT_NAMES["prompt"] if name in columns), None)
    mapping = f", or say columns: {{prompt: {in_yaml(alias)}}}" if alias else ""
    return f"lacks prompt; rename the column of the prompts{mapping}"


def _hint_about_unpaired(columns: Sequence[str], given: Mapping[str, str], missing: Sequence[str], line: str) -> str:
    """What rows with labels lack; `missing` are the sides that they lack, `line` is a mapping that may help."""
    if {"messages", "conversations", "output"}.intersection(columns) or {"messages", "completion"} & given.keys():
        missing = []
    to = "prompt, completion and label (true for a good completion, false for a bad one), or to those of pairs"
    if missing or "label" in columns or "label" in given:
        missing = missing or [name for name in ("prompt",) if name not in columns and name not in given]
        lacks = " and ".join(missing) or "columns that belong together"
        hint = _similar_columns(missing, columns, UNPAIRED.names)
        return f"lacks {lacks}{hint}; rename its columns to {to}{line and f', or {line}'}"
    without = "rows without labels are for SFTGym: algorithm: sft"
    return f"lacks label; rename its columns to {to}{line and f', or {line}'}; {without}"


def _similar_columns(missing: Sequence[str], columns: Sequence[str], known: Collection[str]) -> str:
    """A question for each missing column to which the dataset has a column of a similar name."""
    unknown = [column for column in columns if column not in known]
    pairs = [(nearest_column(name, unknown), name) for name in missing]
    hints = [f"is {column!r} meant to be {name!r}?" for column, name in pairs if column is not None]
    return f" ({' '.join(hints)})" if hints else ""


def _suggested_mapping(columns: Sequence[str], kind: Kind, given: Mapping[str, str]) -> str:
    """A `columns` argument under which the dataset could be read; "" if no columns look like its sides."""
    free = [name for name in columns if name not in given.values()]
    sides = _likely_sides(free, kind)
    if not sides:
        return ""
    free = [name for name in free if name not in sides.values() and name not in sides.get("label", "")]
    before: dict[str, str] = {}
    prefix = f"{next(iter(sides.values())).partition('_')[0]}_"  # such as orig_instruction beside orig_response_A
    for role in ("prompt", "input", "system", "history"):
        names = (*(f"{prefix}{name}" for name in INPUT_NAMES[role]), role, *INPUT_NAMES[role])
        found = next((name for name in names if name in free and role not in given), None)
        if found is not None and found not in before.values() and (role != "input" or "prompt" in before):
            before[role] = found
            free.remove(found)
    # A column with the name of its role needs no entry.
    named = {role: name for role, name in {**before, **sides}.items() if name != role or role == "input"}
    parts = [f"{role}: {name if role == 'label' else in_yaml(name)}" for role, name in {**given, **named}.items()]
    left = [name for name in free if _unused_column_that_matters([name], {**given, **before, **sides}, kind)]
    inner = ", ".join([*parts, f"ignore: [{', '.join(map(in_yaml, left))}]"] if left else parts)
    if not inner:
        return ""
    where = ""
    if UNKNOWN_LABEL in sides.get("label", ""):
        where = f", where {UNKNOWN_LABEL} is a column of yours that says which answer is better, by these values"
    return f"say which column is what, as in columns: {{{inner}}}{where}"


def _likely_sides(columns: Sequence[str], kind: Kind) -> dict[str, str]:
    """The columns that look like answers, by role; for a label its whole entry of the `columns` argument."""
    if kind is not PAIR:
        found = next((name for name in ("completion", *SIDE_NAMES["completion"]) if name in columns), None)
        good = next((name for name in columns if name.strip().lower() in GOOD_OR_BAD_NAMES), None)
        label = {"label": _good_or_bad(good)} if good and found else {}
        return {"completion": found, **label} if found else {}
    named = {side: next((name for name in (side, *SIDE_NAMES[side]) if name in columns), None) for side in kind.sides}
    if all(named.values()):
        return {side: name for side, name in named.items() if name}
    twos = [(first, *others) for first in columns for others in _second_answers(first, columns)]
    if not twos:
        return {}
    first, second, ending = min(twos, key=lambda two: _ANSWER_WORDS.isdisjoint(_words(two[0])))
    others = [name for name in columns if name not in (first, second)]
    return {FIRST: first, SECOND: second, "label": _better_of_two(others, ending)}


def _second_answers(first: str, columns: Collection[str]) -> list[tuple[str, tuple[str, str, str]]]:
    """The columns whose names differ from `first` as in one of `_ENDINGS`, with that one."""
    found = []
    for ending in _ENDINGS:
        for place in range(1, len(first)) if not _NO_ANSWERS.intersection(_words(first)) else ():
            ends = place == len(first) - 1 or not first[place + 1].isalnum()
            stands_alone = ends and (place == len(first) - 1 or ending[0] != "a" or not first[place - 1].isalnum())
            if first[place].lower() == ending[0] and stands_alone:
                mark = ending[1].upper() if first[place].isupper() else ending[1]
                second = first[:place] + mark + first[place + 1 :]
                found += [(second, ending)] if second in columns else []
    return found


def _better_of_two(columns: Sequence[str], ending: tuple[str, str, str]) -> str:
    """The entry of a label that says which of two answers is better; its column is `LABEL` if none is likely."""
    first, second, tie = ending
    named = next((name for name in (*LABELS, *OTHER_LABELS) if name in columns), None)
    telling = [name for name in columns if not _LABEL_WORDS.isdisjoint(_words(name))]
    # Of columns that begin alike each may belong to one answer, as in preferred_a and preferred_b.
    alone = (name for name in telling if sum(_words(name)[0] == _words(other)[0] for other in telling) == 1)
    label = named or next(alone, UNKNOWN_LABEL)
    values = {FIRST: first, SECOND: second, TIE: tie}
    if label in _STRENGTHS:
        values = {FIRST: "[-3, -2, -1]", SECOND: "[1, 2, 3]", TIE: "0"}
    elif {"model_a", "model_b"}.issubset(columns):  # Chatbot Arena
        values = {FIRST: "[a, model_a]", SECOND: "[b, model_b]", TIE: '[tie, "tie (bothbad)", both_bad]'}
    return f"{{column: {in_yaml(label)}, {', '.join(f'{meaning}: {value}' for meaning, value in values.items())}}}"


def _good_or_bad(column: str) -> str:
    """The entry of a label that tells good completions from bad ones."""
    return f"{{column: {in_yaml(column)}, good: [true, 1], bad: [false, 0]}}"


def in_yaml(name: str) -> str:
    """The name as a YAML mapping takes it."""
    return name if _PLAIN_IN_YAML.fullmatch(name) else json.dumps(name)


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower())


# ------------------------------------------------------------------------------------------------------ unused columns


def hint_about_conflict(shape: Shape, unused: Sequence[str], kind: Kind) -> str:
    """What to do about a dataset with two columns of completions; "" if it has one."""
    if kind is EXAMPLE:
        ways = ("messages", "conversations", "completion")
        mine = next((name for name in shape.needs.values() if name in ways), None)
        other = next((name for name in ways if name in unused), None)
        if mine and other:
            first, second = (other, mine) if mine == "completion" else (mine, other)
            return f"has both {first} and {second}; leave one of them out, or say columns: {{ignore: [{other}]}}"
    return ""


def hint_about_unused(unused: Sequence[str], roles: Mapping[str, str], kind: Kind) -> str:
    """What to do about a column without a role that may be meant to be read; "" if there is none.

    `unused` are the columns without a role that the user does not ignore.
    """
    fix = _unused_column_that_matters(unused, roles, kind)
    if fix:
        return fix
    if "text" in roles and "role" in unused:
        return (
            "has a column 'role' that would not be used: a row is one message; join those of a conversation in a "
            "column messages, or say columns: {ignore: [role]} to learn from all texts alike"
        )
    good = next((name for name in unused if name.strip().lower() in GOOD_OR_BAD_NAMES), None)
    if good is not None and {"completion", "messages", "text"} & roles.keys() and "label" not in roles:
        return (
            f"has a column {good!r} that would not be used; to learn from the good ones alone say columns: "
            f"{{label: {_good_or_bad(good)}}}, or {{ignore: [{in_yaml(good)}]}}"
        )
    return ""


def _unused_column_that_matters(unused: Sequence[str], roles: Mapping[str, str], kind: Kind) -> str:
    for name in unused:
        if name in IMAGES:
            return (
                f"has a column {name!r}, and evollm tunes on text alone; leave it out if the text makes sense so, or "
                f"say columns: {{ignore: [{in_yaml(name)}]}}"
            )
    has_prompt = {"prompt", "conversation", "messages", "text"} & roles.keys()
    for name in unused:
        plain = name.strip().lower()
        role = next((role for role, names in INPUT_NAMES.items() if plain in names), None)
        if role == "prompt" and has_prompt:
            role = "input" if plain in INPUT_NAMES["input"] else role
        if role is not None:
            return _would_not_be_used(name, role)
        if plain in CONVERSATIONS:
            return _would_not_be_used(name, "prompt" if kind is PAIR else "messages")
        if "chosen" in roles and "label" not in roles and plain in LABELS:
            fix = f"say columns: {{ignore: [{in_yaml(name)}]}} if chosen is the better side in all rows"
            return f"has a column {name!r} that would not be used; {fix}"
    optional = [role for role in _OPTIONAL if role not in roles and not (role == "prompt" and has_prompt)]
    for role in optional:
        column = nearest_column(role, [name for name in unused if name not in kind.names], _UNUSED_LIKE)
        if column is not None:
            fix = f"rename it to {role}, or leave it out, or {_role_or_ignore(column, role)}"
            return f"has a column {column!r} that would not be used; {fix}"
    return ""


def _would_not_be_used(column: str, role: str) -> str:
    # No column name has the role `input` in every shape, so that renaming would not always help.
    rename = "" if role == "input" else f"rename it to {role}, or "
    return f"has a column {column!r} that would not be used; {rename}{_role_or_ignore(column, role)}"


def _role_or_ignore(column: str, role: str) -> str:
    name = in_yaml(column)
    return f"say columns: {{{role}: {name}}} or {{ignore: [{name}]}}"
