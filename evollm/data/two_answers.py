"""Columns that look like two answers, and like the label that says which of them is better: guesses, for messages."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence

from evollm.data.shapes import FIRST, LABELS, OTHER_LABELS, SECOND, TIE

# What comes in twos beside the answers, as a part of a name.
_NO_ANSWERS = frozenset(
    {"id", "ids", "model", "score", "scores", "rating", "annotator", "label", "rank", "safe", "name"}
)
# What answers are called: such columns are taken before others that come in twos.
_ANSWERS = frozenset(
    {
        *("answer", "response", "output", "completion", "reply", "generation", "candidate", "summary", "text", "ref"),
        *("conversation", "chosen", "solution"),
    }
)
# Parts of names of columns that say which one is better.
_SAYS_WHICH = frozenset({"preference", "preferred", "winner", "better", "label", "choice", "verdict"})
# Strengths from -3, the first one is much better, to 3: HelpSteer 2 and 3.
_STRENGTHS = ("overall_preference", "preference_strength")
# Two answers that differ in one character of their names: the first, the second, neither.
_ENDINGS = (("1", "2", "0"), ("0", "1", "-1"), ("a", "b", "tie"))
UNKNOWN_LABEL = "LABEL"
# Letters first, so that it is no number; true, null and the like are no names that anybody gives a column.
_PLAIN_IN_YAML = re.compile(r"[A-Za-z][\w.-]*( [\w.-]+)*")


def two_answers(columns: Sequence[str]) -> dict[str, str]:
    """The columns that look like two answers, by role; of the label what a configuration would say of it.

    The label's column is `LABEL` where none is known to say which answer is better. {}: there are no two answers.
    """
    found = [(first, *others) for first in columns for others in _other(first, columns)]
    if not found:
        return {}
    first, second, ending = min(found, key=lambda one: _ANSWERS.isdisjoint(_words(one[0])))
    return {FIRST: first, SECOND: second, "label": _label([n for n in columns if n not in (first, second)], ending)}


def _other(first: str, columns: Collection[str]) -> list[tuple[str, tuple[str, str, str]]]:
    """The columns that may be the second one of two, with what ends or divides the two names."""
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


def _label(columns: Sequence[str], ending: tuple[str, str, str]) -> str:
    first, second, tie = ending
    named = next((name for name in (*LABELS, *OTHER_LABELS) if name in columns), None)
    # One of several columns, a one for each answer, says less than it seems to.
    telling = [name for name in columns if not _SAYS_WHICH.isdisjoint(_words(name))]
    alone = (name for name in telling if sum(_words(name)[0] == _words(other)[0] for other in telling) == 1)
    label = named or next(alone, UNKNOWN_LABEL)
    values = {FIRST: first, SECOND: second, TIE: tie}
    if label in _STRENGTHS:
        values = {FIRST: "[-3, -2, -1]", SECOND: "[1, 2, 3]", TIE: "0"}
    elif {"model_a", "model_b"}.issubset(columns):  # Chatbot Arena
        values = {FIRST: "[a, model_a]", SECOND: "[b, model_b]", TIE: '[tie, "tie (bothbad)", both_bad]'}
    return f"{{column: {in_yaml(label)}, {', '.join(f'{meaning}: {value}' for meaning, value in values.items())}}}"


def good_or_bad(column: str) -> str:
    """What a configuration would say of a label that tells good completions from bad ones."""
    return f"{{column: {in_yaml(column)}, good: [true, 1], bad: [false, 0]}}"


def in_yaml(name: str) -> str:
    """The name as it can stand in a mapping of YAML."""
    return name if _PLAIN_IN_YAML.fullmatch(name) else json.dumps(name)


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower())
