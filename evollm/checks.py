"""Checks of single arguments; each returns the value as a plain Python one."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Collection, Mapping
from numbers import Integral, Real
from pathlib import Path

from evollm.errors import ConfigurationError


def finite_number(field: str, value: object) -> float:
    """Return `value` as a Python float; int stays int.

    Raises:
        ConfigurationError: If it is not a number, a bool, or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        hint = "; PyYAML reads 1e-5 as text, write 1.0e-5" if is_number_as_text(value) else ""
        raise ConfigurationError(field, value, f"must be a number{hint}")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        finite = False
    if not finite:
        raise ConfigurationError(field, value, "must be finite")
    return int(value) if isinstance(value, Integral) else float(value)


def nearest_name(name: str, known: Collection[str], aliases: Mapping[str, str] | None = None) -> str | None:
    """The known name that was perhaps meant: what an alias stands for, else the one spelt most alike; None of none."""
    alias = (aliases or {}).get(name)
    if alias is not None and alias in known:
        return alias
    return next(iter(difflib.get_close_matches(name, known, 1, cutoff=0.0)), None)


def is_number_as_text(value: object) -> bool:
    """Whether it is text that says a finite number."""
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False


def positive_number(field: str, value: object) -> float:
    """Return `value` as a Python number above 0.

    Raises:
        ConfigurationError: If it is not a finite number above 0.
    """
    number = finite_number(field, value)
    if number <= 0:
        raise ConfigurationError(field, value, "must be above 0")
    return number


def whole_number(field: str, value: object, minimum: int) -> int:
    """Return `value` as a Python int.

    Raises:
        ConfigurationError: If it is not an integer or lies below `minimum`.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ConfigurationError(field, value, f"must be a whole number of at least {minimum}")
    return int(value)


def optional_whole_number(field: str, value: object, minimum: int) -> int | None:
    """Return `value` as a Python int, or None.

    Raises:
        ConfigurationError: If it is neither None nor an integer of at least `minimum`.
    """
    return None if value is None else whole_number(field, value, minimum)


def switch(field: str, value: object) -> bool:
    """Return `value`, which is True or False.

    Raises:
        ConfigurationError: If it is anything else, such as the text "no".
    """
    if not isinstance(value, bool):
        raise ConfigurationError(field, value, "must be True or False")
    return value


def optional_switch(field: str, value: object) -> bool | None:
    """Return `value`, which is True, False or None.

    Raises:
        ConfigurationError: If it is anything else.
    """
    if value is not None and not isinstance(value, bool):
        raise ConfigurationError(field, value, "must be True, False or None")
    return value


def expanded(path: str | os.PathLike[str]) -> str:
    """The path with the user's home for a `~` that it begins with."""
    return os.path.expanduser(os.fspath(path))


def located(name: str | os.PathLike[str]) -> str:
    """The absolute path of a file or folder that is there, so that it is found from anywhere; a name stays as it is."""
    text = expanded(name)
    try:
        return os.path.abspath(text) if text and os.path.exists(text) else text
    except ValueError:  # with a null byte
        return text


def usable_path(field: str, value: object) -> Path:
    """Return `value` as a path, which may or may not exist; `~` is the user's home.

    Raises:
        ConfigurationError: If it is no path, or one that the file system cannot have.
    """
    if not isinstance(value, str | os.PathLike):
        raise ConfigurationError(field, value, "must be a path")
    if value == "":
        raise ConfigurationError(field, value, "is empty, perhaps a variable that was not set: give a path")
    try:
        path = Path(expanded(value))
        path.resolve()
        path.exists()
    except (OSError, ValueError, TypeError, RuntimeError) as error:  # too long, with a null byte, of bytes
        raise ConfigurationError(field, value, f"is not a path that can be used: {error}") from None
    return path
