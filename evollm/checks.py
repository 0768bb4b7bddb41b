"""Checks of single arguments; each returns the value as a plain Python one."""

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
    """The known name that was perhaps meant: what an alias stands for, else the one spelt most alike; None of none."""
    alias = (aliases or {}).get(name)
    if alias is not None and alias in known:
        return alias
    spelt = {_folded(one): one for one in known}
    return next((spelt[one] for one in difflib.get_close_matches(_folded(name), spelt, 1, cutoff=0.0)), None)


def _folded(name: str) -> str:
    """The name in small letters, with an underscore for a hyphen."""
    return name.lower().replace("-", "_")


def is_number_as_text(value: object) -> bool:
    """Whether it is text that says a finite number."""
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False


def number_hint(value: object) -> str:
    """How a number is written, for who has written it as text; "" for anything else."""
    if is_number_as_text(value):
        yaml = " (PyYAML reads 1e-5 as text, write 1.0e-5)" if "e" in str(value).lower() else ""
        return f"; it is text, so take its quotation marks away{yaml}"
    if isinstance(value, str) and is_number_as_text(value.strip().replace(",", ".", 1)):
        return f"; write {value.strip().replace(',', '.', 1)}, with a point"
    if isinstance(value, str) and is_number_as_text(value.strip().removesuffix("%")):
        return f"; write {float(value.strip().removesuffix('%')) / 100!r}"
    return ""


def whole_hint(value: object) -> str:
    """How a whole number is written, for who has written it otherwise."""
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
    """The path with the user's home for a `~` that it begins with."""
    return os.path.expanduser(os.fspath(path))


def located(name: str | os.PathLike[str]) -> str:
    """The absolute path of a file or folder that is there, so that it is found from anywhere; a name stays as it is."""
    text = expanded(name)
    try:
        return os.path.abspath(text) if text and os.path.exists(text) else text
    except ValueError:  # with a null byte
        return text


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file stands for one that Git LFS has not fetched."""
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER


def hub_name_in(text: str) -> str | None:
    """The name of a model or dataset on the hub, of the address of its page; None of anything else."""
    found = _HUB_PAGE.fullmatch(text)
    return found["name"] if found else None


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
