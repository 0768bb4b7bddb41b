"""What is asked of users' functions of prompts and answers, and how a message names the prompt that they fail on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from textwrap import shorten
from typing import Any, TypeVar

T = TypeVar("T")
# Most characters of a prompt that a message quotes.
_QUOTED = 60


def as_list(given: Any) -> list[Any] | None:
    """What a function returned as a list; None for what is no list of values, such as a text or a mapping."""
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        return None
    try:
        return list(given)
    except TypeError:  # a tensor or an array without dimensions
        return None


def as_number(value: Any) -> float | None:
    """A real number of any library, or a tensor or array without dimensions that is one; None for anything else."""
    plain = value.item() if getattr(value, "ndim", None) == 0 else value
    return float(plain) if isinstance(plain, Real) else None


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
