"""Checks of single arguments; each returns the value as a plain Python value."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Collection, Mapping
from numbers import Integral, Real
from pathlib import Path

from evollm.errors import ConfigurationError

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_HUB_PAGE = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?:datasets/)?(?P<name>[\w.-]+(?:/[\w.-]+)?)/?")


def finite_number(field: str, value: object) -> float:
    """Return `value` as a Python float; int stays int.

    Raises:
        ConfigurationError: If it is not a number, a bool, or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ConfigurationError(field, value, f"must be a number{number_hint(value)}")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        finite = False
    if not finite:
        raise ConfigurationError(field, value, "must be finite")
    return int(value) if isinstance(value, Integral) else float(value)


def nearest_name(name: str, known: Collection[str], aliases: Mapping[str, str] | None = None) -> str | None:
    """Return the known name of an alias, else the known name with the most similar spelling; None if none is known."""
    alias = (aliases or {}).get(name)
    if alias is not None and alias in known:
        return alias
    by_spelling = {one.lower().replace("-", "_"): one for one in known}
    nearest = difflib.get_close_matches(name.lower().replace("-", "_"), by_spelling, 1, cutoff=0.0)
    return by_spelling[nearest[0]] if nearest else None


def is_number_as_text(value: object) -> bool:
    """Whether the value is a string with a finite number."""
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False


def number_hint(value: object) -> str:
    """Return a hint on how to write a number that was given as text; "" for other values."""
    if is_number_as_text(value):
        yaml = " (PyYAML reads 1e-5 as text, write 1.0e-5)" if "e" in str(value).lower() else ""
        return f"; it is text, so take its quotation marks away{yaml}"
    if isinstance(value, str) and is_number_as_text(value.strip().replace(",", ".", 1)):
        return f"; write {value.strip().replace(',', '.', 1)}, with a point"
    if isinstance(value, str) and is_number_as_text(value.strip().removesuffix("%")):
        return f"; write {float(value.strip().removesuffix('%')) / 100!r}"
    return ""


def whole_hint(value: object) -> str:
    """Return a hint on how to write a whole number that was given as a float or as text; "" for other values."""
    if isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    return number_hint(value)


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
        fix = f"must be a whole number of at least {minimum}{whole_hint(value)}"
        raise ConfigurationError(field, value, fix)
    return int(value)


def optional_whole_number(field: str, value: object, minimum: int) -> int | None:
    """Return `value` as a Python int, or None.

    Raises:
        ConfigurationError: If it is neither None nor an integer of at least `minimum`.
    """
    return None if value is None else whole_number(field, value, minimum)


def boolean(field: str, value: object) -> bool:
    """Return `value`, which is True or False.

    Raises:
        ConfigurationError: If it is anything else, such as the text "no".
    """
    if not isinstance(value, bool):
        raise ConfigurationError(field, value, "must be True or False")
    return value


def optional_boolean(field: str, value: object) -> bool | None:
    """Return `value`, which is True, False or None.

    Raises:
        ConfigurationError: If it is anything else.
    """
    if value is not None and not isinstance(value, bool):
        raise ConfigurationError(field, value, "must be True, False or None")
    return value


def expanded(path: str | os.PathLike[str]) -> str:
    """Return the path with a leading `~` replaced by the user's home directory."""
    return os.path.expanduser(os.fspath(path))


def located(name: str | os.PathLike[str]) -> str:
    """Return the absolute path of an existing file or folder; other names, such as those on the hub, are unchanged."""
    text = expanded(name)
    try:
        return os.path.abspath(text) if text and os.path.exists(text) else text
    except ValueError:  # with a null byte
        return text


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is a Git LFS pointer, whose content has not been fetched."""
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER


def hub_name_in(text: str) -> str | None:
    """Return the hub name of a model or dataset from the URL of its page; None for other texts."""
    found = _HUB_PAGE.fullmatch(text)
    return found["name"] if found else None


def usable_path(field: str, value: object) -> Path:
    """Return `value` as a path, which need not exist; `~` is the user's home directory.

    Raises:
        ConfigurationError: If it is not a path, or not one that the file system allows.
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
