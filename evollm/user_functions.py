"""What is asked of users' functions of prompts and answers, and how a message names the prompt that they fail on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from numbers import Real
from textwrap import shorten
from typing import Any, TypeVar

T = TypeVar("T")
# Most characters of a prompt that a message quotes.
_QUOTED = 60


def as_list(given: Any) -> list[Any] | None:
    """What a function returned as a list; None for what is no list of values, such as a text, a mapping or a set.

    A generator runs here, and may raise anything.
    """
    if isinstance(given, str | bytes | Mapping | Set):
        return None
    try:
        values = iter(given)
    except TypeError:  # also a tensor or an array without dimensions
        return None
    return list(values)


def read_out(given: Any) -> Any:
    """What a function returned, as a list if it is one, so that a generator has run where its function is called."""
    found = as_list(given)
    return given if found is None else found


def as_number(value: Any) -> float | None:
    """A real number of any library, or a tensor or array without dimensions that is one; None for anything else.

    Integers that are too large for a float are infinite.
    """
    plain = value.item() if getattr(value, "ndim", None) == 0 else value
    try:
        return float(plain) if isinstance(plain, Real) else None
    except OverflowError:
        return math.inf if plain > 0 else -math.inf


def first_failing(items: Sequence[T], call: Callable[[T], object]) -> T:
    """The first item on which a call raises by itself; else the first item."""
    for item in items:
        try:
            call(item)
        except Exception:  # Whatever the user's function raises.
            return item
    return items[0]


def first_words(prompt: Any) -> str:
    """The first words of a prompt, a string, or of its last message."""
    text = prompt if isinstance(prompt, str) else prompt[-1].get("content", "") if prompt else ""
    return shorten(str(text), _QUOTED, placeholder=" ...")
